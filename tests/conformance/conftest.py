"""Rows that need a mesh of devices run in a process of their own: tests/test_several_devices.py."""

import os

if "SPMD_DEVICES" not in os.environ:
    collect_ignore_glob = ["test_spmd_*.py"]
