"""A GPU computes what the CPU does; runs only where there is one."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.parity.test_backends import start

pytestmark = [pytest.mark.slow, pytest.mark.hardware,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]

MOST = 1e-3


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out, found = tmp_path_factory.mktemp("cuda"), {}
    for backend in ("native1", "cuda1"):
        (process,) = start(backend, 1, out)
        _, errors = process.communicate(timeout=400)
        assert process.returncode == 0, errors
        found[backend] = json.loads((out / f"{backend}-0.json").read_text())
    return found


@pytest.mark.parametrize("recipe", ["digits", "gpt_bytes"])
def test_a_gpu_and_the_cpu_agree(results, recipe):
    cpu, gpu = results["native1"][recipe], results["cuda1"][recipe]
    assert np.abs(np.subtract(gpu["weights"], cpu["weights"])).max() < MOST
    for name, value in cpu["metrics"].items():
        assert np.abs(np.subtract(gpu["metrics"][name], value)).max() < MOST, name
