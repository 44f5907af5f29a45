"""When weights of replicas are compared, and what is a difference."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from tpuspec.loops.drift import DriftCheck, ReplicaDriftError
from tpuspec.native.checksums import checksums


def session_of(*models, other_hosts=lambda own: []):
    asked = []

    def exchange(value, *, name):
        asked.append(name)
        return [value, *other_hosts(value)]

    num_hosts = 1 + len(other_hosts([[[0.0, 0.0]]]))
    backend = SimpleNamespace(
        sums_of_parameters=lambda replicas: [checksums(replica.model) for replica in replicas],
        topology=SimpleNamespace(num_replicas=len(models) * num_hosts, replicas_per_program=1),
        coordinator=SimpleNamespace(num_hosts=num_hosts, exchange=exchange))
    return SimpleNamespace(module=models[0], replicas=[SimpleNamespace(model=model) for model in models],
                           backend=backend), asked


def model(value=1.0):
    made = nn.Linear(2, 2)
    for parameter in made.parameters():
        nn.init.constant_(parameter, value)
    return made


def test_one_replica_is_not_compared():
    session, asked = session_of(model())
    for step in range(0, 5000, 100):
        DriftCheck(session=session, most_steps=100).at_boundary(step)
    assert not asked


def test_replicas_are_compared_ever_more_rarely():
    session, asked = session_of(model(), model())
    check, compared = DriftCheck(session=session, most_steps=400), []
    for step in range(10, 2000, 10):
        before = len(asked)
        check.at_boundary(step)
        if len(asked) > before:
            compared.append(step)
    assert compared == [60, 160, 360, 760, 1160, 1560, 1960]


@pytest.mark.parametrize(("other", "is_drift"), [(1.0, False), (1.0 + 1e-6, False), (1.001, True), (-1.0, True),
                                                 (float("nan"), True), (float("inf"), True)])
def test_what_is_no_rounding_is_drift_and_has_a_name(other, is_drift):
    session, _ = session_of(model(), model(), model(other))
    check = DriftCheck(session=session, most_steps=10)
    check.at_boundary(0)
    if not is_drift:
        check.at_boundary(10)
        return
    with pytest.raises(ReplicaDriftError, match="parameter 'weight' has not the same values on replicas 0 and 2"):
        check.at_boundary(10)


def test_weights_that_are_nan_everywhere_are_no_drift():
    session, asked = session_of(model(float("nan")), model(float("nan")))
    check = DriftCheck(session=session, most_steps=10)
    check.at_boundary(0)
    check.at_boundary(10)
    assert asked


def test_another_host_may_have_drifted():
    session, _ = session_of(model(), other_hosts=lambda own: [[[[total + 1, size] for total, size in own[0]]]])
    check = DriftCheck(session=session, most_steps=10)
    check.at_boundary(0)
    with pytest.raises(ReplicaDriftError, match="replicas 0 and 1"):
        check.at_boundary(10)


def test_a_model_without_parameters_is_not_compared():
    session, asked = session_of(nn.Tanh(), nn.Tanh())
    check = DriftCheck(session=session, most_steps=10)
    check.at_boundary(0)
    check.at_boundary(10)
    assert not asked
