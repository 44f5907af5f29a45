"""From input_fn to batches of one static shape, and which host and replica gets which rows."""
