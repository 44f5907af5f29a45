"""Devices: the only home of torch_xla. `select` picks a backend; a backend runs steps."""
