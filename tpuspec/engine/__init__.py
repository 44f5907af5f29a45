"""Runs programs on PJRT devices; the only part of tpuspec that imports jax, which costs a second."""

import warnings

# jax warns at each fork of the process. A DataLoader forks its workers, which never call jax.
warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
