"""What tests of model_fns need: a backend without devices, tiny models, a clock that is set by hand."""
