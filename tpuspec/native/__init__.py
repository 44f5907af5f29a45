"""Plain PyTorch, for `use_tpu=False`: in one process, or in torchrun's."""
