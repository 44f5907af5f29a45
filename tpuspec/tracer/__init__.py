"""From a training step to a program: the only home of torch_xla, which runs on the CPU and traces."""
