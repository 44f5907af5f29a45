"""Tests of several replicas need an XLA client with 8 CPU devices: a process of their own.

`tests/test_several_devices.py` starts it; by hand: CPU_NUM_DEVICES=8 pytest tests/replicas.
"""

import os

if os.environ.get("CPU_NUM_DEVICES") == "8":
    for name, threads in {"XLA_THREAD_POOL_SIZE": "64", "NPROC": "32", "PJRT_NPROC": "32"}.items():
        os.environ.setdefault(name, threads)
else:
    collect_ignore_glob = ["test_*.py"]
