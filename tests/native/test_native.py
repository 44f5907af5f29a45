"""The native backend of one process."""

from __future__ import annotations

import pytest
import torch

from tests.models import make_config, make_trainer, run
from tpuspec.errors import ConfigError


def weights(trainer):
    return [parameter.detach().clone() for parameter in trainer._sessions[False].module.parameters()]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_a_compiled_module_computes_the_same_and_saves_under_the_same_names(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    plain, compiled = (
        make_trainer(tmp_path / str(flag), use_tpu=False, config=make_config(compile=flag)) for flag in (False, True))
    for trainer in (plain, compiled):
        run(trainer, "train")
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights(plain), weights(compiled), strict=True))
    assert plain.get_variable_names() == compiled.get_variable_names()


@pytest.mark.parametrize("change", [{"device": "cpu"}, {"compile": True}])
def test_settings_of_plain_pytorch_are_refused_where_nothing_is_plain(tmp_path, change):
    with pytest.raises(ConfigError, match=f"{next(iter(change))}=.* has no effect with use_tpu=True"):
        make_trainer(tmp_path, config=make_config(**change))
    make_trainer(tmp_path, config=make_config(**change), eval_on_tpu=False)
