"""The host half: outputs drained from the device, put together, and given to the user's host functions in order."""
