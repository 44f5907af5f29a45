"""Runnable examples; each is a model_fn, an input_fn and a YAML in tpuspec/configs/config/."""
