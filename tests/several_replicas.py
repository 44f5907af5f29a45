"""Trainers over several replicas that need no device: FakeBackend in the place of XLA."""

from __future__ import annotations

import pytest

from tpuspec.testing import FakeBackend


def use_fake(monkeypatch: pytest.MonkeyPatch, num_replicas: int) -> list[FakeBackend]:
    """Makes every Trainer of this test run on fakes; returns them as they are made."""
    made: list[FakeBackend] = []

    def select(config, *, use_tpu):
        made.append(FakeBackend(num_replicas))
        return made[-1]

    monkeypatch.setattr("tpuspec.trainer.select", select)
    return made
