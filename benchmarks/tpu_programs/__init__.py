"""Training steps of three models, for the Trainer and by hand in JAX; bench_tpu_program.py compiles both."""
