"""Small jobs written from the documentation: XLA gives what plain PyTorch gives, and replays where it can."""

from __future__ import annotations

import pytest
import torch

from tests.users import agents, language, tables, vision
from tests.users.job import STEPS, run

JOBS = [*vision.JOBS, *language.JOBS, *tables.JOBS, *agents.JOBS]


@pytest.mark.parametrize("job", JOBS, ids=[job.name.replace(" ", "-") for job in JOBS])
def test_a_users_job_is_what_plain_pytorch_makes_of_it(job, tmp_path):
    found, plain = [run(job, tmp_path / str(use_tpu), use_tpu=use_tpu) for use_tpu in (True, False)]
    assert len(plain.losses) == STEPS
    assert found.losses == pytest.approx(plain.losses, rel=job.precise)
    assert found.metrics == pytest.approx(plain.metrics, rel=job.precise)
    assert len(found.predictions) == len(plain.predictions) > 0
    for one, other in zip(found.predictions, plain.predictions, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[name])) or torch.allclose(
                torch.as_tensor(value), torch.as_tensor(other[name]), rtol=1e-5, atol=1e-5), name
    assert found.kind == job.kind
