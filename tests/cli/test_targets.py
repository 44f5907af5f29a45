import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tpuspec.cli.schema import TrainConfig
from tpuspec.cli.targets import BUILT_IN_PREFIXES, allowed_prefixes, resolve, resolve_functions
from tpuspec.errors import ConfigError, ConfigTypeError


def settings(**changes):
    return TrainConfig(**{"model_fn": "tpuspec.recipes.digits.model_fn",
                          "input_fn": "tpuspec.recipes.digits.input_fn", **changes})


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A package that leaves a file behind when it is imported, and has aliases of things that it does not own."""
    package = tmp_path / "stranger"
    package.mkdir()
    (package / "__init__.py").write_text(
        f"import os, pathlib\nfrom os import system\nfrom subprocess import run\nimport functools\n"
        f"pathlib.Path({str(tmp_path / 'imported')!r}).touch()\n"
        "def model_fn(features, params): ...\nNUMBER = 3\npartial = functools.partial(model_fn)\n")
    (package / "broken.py").write_text("import no_such_module_of_theirs\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "stranger"]:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["os.system", "stranger.model_fn", "tpuspecx.f", "recipes.f", "torch.load",
                                  "torch.optimx.f"])
def test_name_outside_the_prefixes_is_refused_before_any_import(stranger, name):
    with pytest.raises(ConfigError, match=rf"model_fn={name} is refused: names resolve only below tpuspec\., torch"):
        resolve_functions(settings(model_fn=name), BUILT_IN_PREFIXES)
    assert not (stranger / "imported").exists()


def test_one_wrong_name_prevents_the_import_of_the_others(stranger):
    with pytest.raises(ConfigError, match=r"input_fn=os\.system is refused"):
        resolve_functions(settings(model_fn="stranger.model_fn", input_fn="os.system"), allowed_prefixes(["stranger"]))
    assert not (stranger / "imported").exists()


@pytest.mark.parametrize("prefix", ["stranger", "stranger."])
def test_prefix_of_the_user_is_allowed_with_and_without_its_dot(stranger, prefix):
    assert callable(resolve("model_fn", "stranger.model_fn", allowed_prefixes([prefix])))


@pytest.mark.parametrize("name", ["system", "run"])
def test_alias_of_something_outside_is_refused(stranger, name):
    with pytest.raises(ConfigError, match=r"is refused: it is an alias of (posix\.system|subprocess\.run)"):
        resolve("model_fn", f"stranger.{name}", allowed_prefixes(["stranger"]))


def test_module_reached_through_another_is_refused():
    with pytest.raises(ConfigError, match=r"there is no module 'tpuspec\.recipes\.digits\.torch'"):
        resolve("model_fn", "tpuspec.recipes.digits.torch.load", BUILT_IN_PREFIXES)


@pytest.mark.parametrize("name", ["NUMBER", "os", "partial"])
def test_only_functions_and_classes_resolve(stranger, name):
    with pytest.raises(ConfigTypeError, match="must name a function or a class"):
        resolve("model_fn", f"stranger.{name}", allowed_prefixes(["stranger"]))


@pytest.mark.parametrize("prefix", ["", ".", "a b", "..", "os;", 3])
def test_prefix_that_is_no_package_is_refused(prefix):
    with pytest.raises(ConfigError, match="allow takes names of packages"):
        allowed_prefixes([prefix])


@pytest.mark.parametrize("name", ["model_fn", "tpuspec.", "tpuspec..digits", "tpuspec.recipes.digits.model_fn()", ""])
def test_name_that_is_not_dotted_is_refused(name):
    with pytest.raises(ConfigError, match="model_fn must be a dotted name"):
        resolve_functions(settings(model_fn=name), BUILT_IN_PREFIXES)


def test_misspelt_function_gets_the_nearest_name():
    with pytest.raises(ConfigError, match=r"module tpuspec\.recipes\.digits has no 'modelfn'; did you mean 'model_fn'"):
        resolve("model_fn", "tpuspec.recipes.digits.modelfn", BUILT_IN_PREFIXES)


def test_missing_module_is_named():
    with pytest.raises(ConfigError, match=r"there is no module .tpuspec\.recipes\.digitz."):
        resolve("model_fn", "tpuspec.recipes.digitz.model_fn", BUILT_IN_PREFIXES)


def test_import_error_inside_the_users_module_stays_the_users(stranger):
    with pytest.raises(ModuleNotFoundError, match="no_such_module_of_theirs"):
        resolve("model_fn", "stranger.broken.f", allowed_prefixes(["stranger"]))


@pytest.mark.parametrize(("where", "params"), [
    ("params", {"_target_": "os.system"}), ("params.a", {"a": {"_target_": "os.system"}}),
    (r"params.a.1", {"a": [1, {"_target_": "os.system"}]}),
])
def test_target_in_params_is_refused(where, params):
    with pytest.raises(ConfigError, match=rf"{where}\._target_ is refused"):
        resolve_functions(settings(params=params), BUILT_IN_PREFIXES)


def test_target_among_the_optimizers_arguments_is_refused():
    with pytest.raises(ConfigError, match=r"optimizer\.lr\._target_ is refused"):
        resolve_functions(settings(optimizer={"_target_": "torch.optim.AdamW", "lr": {"_target_": "os.getpid"}}),
                          BUILT_IN_PREFIXES)


def test_optimizer_of_a_target_gets_its_arguments():
    functions = resolve_functions(settings(optimizer={"_target_": "torch.optim.AdamW", "lr": 0.5}), BUILT_IN_PREFIXES)
    assert functions.optimizer is not None
    optimizer = functions.optimizer(nn.Linear(2, 2), {})
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(("optimizer", "error", "message"), [
    ({"_target_": "os.system"}, ConfigError, r"optimizer=os\.system is refused"),
    ({"lr": 1}, ConfigError, "optimizer has no _target_"),
    ({"_target_": "torch.optim.AdamW", "lrr": 1}, ConfigError, "optimizer.lrr: .* did you mean 'lr'"),
    ({"_target_": "torch.optim.lr_scheduler.StepLR"}, ConfigTypeError, "must be a class of optimizers"),
    ({"_target_": "tpuspec.recipes.digits.optimizer"}, ConfigTypeError, "write optimizer=tpuspec.recipes"),
    ({"_target_": 3}, ConfigTypeError, "must be a dotted name"),
    ("torch.optim.AdamW", ConfigError, "is a class; write it as optimizer={_target_: torch.optim.AdamW"),
    (3, ConfigTypeError, "must be a dotted name"),
])
def test_wrong_optimizer_is_refused(optimizer, error, message):
    with pytest.raises(error, match=message):
        resolve_functions(settings(optimizer=optimizer), BUILT_IN_PREFIXES)


def test_optimizer_of_a_target_needs_a_model():
    functions = resolve_functions(settings(optimizer={"_target_": "torch.optim.SGD", "lr": 1}), BUILT_IN_PREFIXES)
    assert functions.optimizer is not None
    with pytest.raises(ConfigError, match="there is no model"):
        functions.optimizer(None, {})


def test_saved_config_with_a_target_is_data(command, capsys, folder, user_config):
    """Faults 48: a file cannot name what the command line did not allow, whatever it says itself."""
    directory = user_config("defaults: [digits, _self_]\nmodel_fn: os.system\n")
    assert command("config=mine", "--config-dir", str(directory)) == 2
    assert "model_fn=os.system is refused" in capsys.readouterr().err
    assert list(folder.iterdir()) == []


def test_allow_on_the_command_line_lets_a_package_in(command, calls, stranger):
    assert command("config=digits", "model_fn=stranger.model_fn", "allow=[stranger.]") == 0
    assert calls.made[0]["model_fn"].__module__ == "stranger"


def test_scheduler_target_makes_a_schedule_of_the_optimizer():
    target = {"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 1, "gamma": 0.5}
    functions = resolve_functions(settings(scheduler=target), BUILT_IN_PREFIXES)
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    schedule = functions.scheduler(optimizer, {})
    assert schedule.optimizer is optimizer and schedule.gamma == 0.5
    with pytest.raises(ConfigError, match="is for one optimizer, and there are several"):
        functions.scheduler({"a": optimizer}, {})


@pytest.mark.parametrize(("scheduler", "message"), [
    ("torch.optim.lr_scheduler.StepLR", r"is a class; write it as scheduler=\{_target_: "),
    ({"_target_": "torch.optim.lr_scheduler.StepLR", "stepsize": 1}, "did you mean 'step_size'"),
    ({"step_size": 1}, "scheduler has no _target_, such as torch.optim.lr_scheduler.CosineAnnealingLR"),
])
def test_wrong_scheduler_is_refused(scheduler, message):
    with pytest.raises(ConfigError, match=message):
        resolve_functions(settings(scheduler=scheduler), BUILT_IN_PREFIXES)


def test_scheduler_target_must_be_a_schedule():
    with pytest.raises(ConfigTypeError, match="must be a class of schedules"):
        resolve_functions(settings(scheduler={"_target_": "torch.optim.AdamW"}), BUILT_IN_PREFIXES)
