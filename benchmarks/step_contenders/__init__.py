"""The contenders of bench_step.py, one module each, and the workloads they share.

A contender's module has NEEDS, the packages it imports beside torch, and `prepare(workload_name) -> measure`, where
`measure(num_steps)` returns milliseconds per training step, warm-up left out. All get their batches from host memory,
and the time ends when the last step is done.
"""
