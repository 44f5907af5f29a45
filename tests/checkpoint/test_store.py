import os
import shutil
import stat

import pytest
import torch
from torch import nn

from tests.checkpoints import state_of
from tpuspec.checkpoint.restore import load_into_module
from tpuspec.checkpoint.state import TrainingState
from tpuspec.checkpoint.store import CheckpointStore
from tpuspec.errors import CheckpointError, ConfigError


@pytest.fixture
def store(tmp_path):
    store = CheckpointStore(tmp_path / "run")
    store.prepare()
    return store


def _names(store: CheckpointStore) -> list[str]:
    return sorted(os.listdir(store.model_dir))


def test_prepare_makes_the_folder_and_leaves_it_empty(tmp_path):
    store = CheckpointStore(str(tmp_path / "a" / "ü b"))
    store.prepare()
    store.prepare()
    assert _names(store) == []


@pytest.mark.parametrize("below", ["", "run"])
def test_prepare_refuses_a_file_in_the_place_of_the_folder(tmp_path, below):
    file = tmp_path / "taken"
    file.write_text("x")
    with pytest.raises(ConfigError, match=r"model_dir must be a folder that can be written; '.*taken.*set another"):
        CheckpointStore(file / below).prepare()
    assert file.read_text() == "x"


@pytest.mark.parametrize("model_dir", ["/proc", "/proc/tpuspec", "/tmp/nul\0byte", "/tmp/" + "x" * 300])
def test_prepare_refuses_what_even_root_cannot_write(model_dir):
    with pytest.raises(ConfigError, match="model_dir must be a folder that can be written"):
        CheckpointStore(model_dir).prepare()


def test_prepare_refuses_a_folder_without_permission(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ConfigError, match="Permission denied"):
            CheckpointStore(tmp_path).prepare()
    finally:
        tmp_path.chmod(0o700)


def test_a_saved_state_comes_back(store):
    state = TrainingState(
        global_step=5,
        model={"w": torch.randn(2, 3), "n": torch.tensor(7), "half": torch.ones(2, dtype=torch.bfloat16)},
        optimizers={"g": {"state": {0: {"m": torch.randn(2)}}, "lr": (0.1, float("inf"))}, "d": {}},
        extra={"rng": [1, 2], "position": {3: (4, None)}})
    state.extra["tensor"] = torch.tensor([1, 2])
    path = store.save(state)
    got = store.load(path)
    assert path == store.model_dir / "checkpoint-5"
    assert sorted(os.listdir(path)) == ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert got.global_step == store.read_step(path) == 5
    assert got.model.keys() == state.model.keys()
    assert all(torch.equal(got.model[name], value) and got.model[name].dtype == value.dtype
               for name, value in state.model.items())
    assert torch.equal(got.optimizers["g"]["state"][0]["m"], state.optimizers["g"]["state"][0]["m"])
    assert got.optimizers["g"]["lr"] == (0.1, float("inf"))
    assert got.optimizers["d"] == {}
    assert torch.equal(got.extra.pop("tensor"), state.extra.pop("tensor"))
    assert got.extra == state.extra


def test_a_state_without_a_module_comes_back(store):
    got = store.load(store.save(TrainingState(global_step=0)))
    assert (got.global_step, got.model, got.optimizers, got.extra) == (0, {}, {}, {})


def _train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        module(torch.randn(8, 4, generator=generator)).square().mean().backward()
        optimizer.step()


def _make() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    groups = [{"params": module[0].parameters(), "lr": 1e-2},
              {"params": [*module[1].parameters(), *module[2].parameters()], "lr": torch.tensor(1e-3)}]
    return module, torch.optim.AdamW(groups, amsgrad=True, capturable=False, foreach=False)


def test_adamw_goes_on_bit_equal_from_a_checkpoint(store):
    module, optimizer = _make()
    _train(module, optimizer, 3, seed=2)
    store.save(TrainingState(global_step=3, model=module.state_dict(), optimizers={"": optimizer.state_dict()}))
    _train(module, optimizer, 3, seed=4)

    resumed, resumed_optimizer = _make()
    state = store.load(store.latest())
    load_into_module(resumed, state.model)
    resumed_optimizer.load_state_dict(state.optimizers[""])
    _train(resumed, resumed_optimizer, 3, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(
        module.state_dict().values(), resumed.state_dict().values(), strict=True))
    group, resumed_group = optimizer.state_dict()["param_groups"][0], resumed_optimizer.state_dict()["param_groups"][0]
    assert [(k, type(v), v) for k, v in group.items()] == [(k, type(v), v) for k, v in resumed_group.items()]


def test_tied_weights_are_saved_under_both_names(store):
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    module[1].weight = module[0].weight
    got = store.load(store.save(TrainingState(global_step=1, model=module.state_dict())))
    assert torch.equal(got.model["0.weight"], got.model["1.weight"])


def test_saving_has_read_all_when_it_returns_and_changes_nothing(store):
    state = state_of(1, value=2.0)
    path = store.save(state)
    state.model["w"].zero_()
    assert store.load(path).model["w"].tolist() == [2.0, 2.0, 2.0]


def test_loaded_tensors_outlive_the_files(store):
    path = store.save(state_of(1))
    state = store.load(path)
    os.truncate(path / "model.safetensors", 0)
    store.delete(1)
    state.model["w"].add_(1)
    assert state.model["w"].tolist() == [2.0, 2.0, 2.0]


def test_saving_a_step_again_replaces_it(store):
    store.save(state_of(1, value=1.0))
    path = store.save(state_of(1, value=9.0))
    assert store.load(path).model["w"].tolist() == [9.0] * 3
    assert _names(store) == ["checkpoint-1"]


def test_all_files_have_the_same_permissions(store):
    path = store.save(state_of(1))
    assert len({stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()}) == 1


@pytest.mark.parametrize("broken", ["os.replace", "os.write", "os.fsync", "os.mkdir"])
@pytest.mark.parametrize("step", [1, 2], ids=["replacing", "new"])
def test_a_failed_save_touches_nothing(store, monkeypatch, broken, step):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    store.save(state_of(1, value=1.0))
    with monkeypatch.context() as patch:
        patch.setattr(broken, fail)
        message = (rf"checkpoint-{step} could not be written to .*run'; the earlier ones are untouched. "
                   r"It needs \d+ bytes, and [\d,]+ are free")
        with pytest.raises(CheckpointError, match=message) as caught:
            store.save(state_of(step, value=2.0))
    assert isinstance(caught.value.__cause__, OSError)
    assert _names(store) == ["checkpoint-1"]
    assert store.load(store.path(1)).model["w"].tolist() == [1.0] * 3


def test_saving_without_the_folder_is_a_checkpoint_error(store):
    shutil.rmtree(store.model_dir)
    with pytest.raises(CheckpointError, match=r"checkpoint-1 could not be written .*FileNotFoundError"):
        store.save(state_of(1))


def test_a_state_that_cannot_be_stored_writes_nothing(store):
    with pytest.raises(CheckpointError, match=r"got builtins.object at state\['optimizers'\]\[''\]\['hook'\]"):
        store.save(TrainingState(global_step=1, optimizers={"": {"hook": object()}}))
    assert _names(store) == []


def test_steps_are_sorted_by_number_and_foreign_folders_passed_over(store):
    for step in (10, 9, 100, 0):
        store.save(state_of(step))
    for name in ("checkpoint-7", "checkpoint-x", "checkpoint-012", "checkpoint--1", ".tmp-checkpoint-3-00000000",
                 "eval", "checkpoint-٣"):
        (store.model_dir / name).mkdir()
    (store.model_dir / "checkpoint-8").write_text("a file")
    shutil.copytree(store.path(9), store.path(11))
    (store.path(11) / "manifest.json").unlink()
    assert store.steps() == [0, 9, 10, 100]
    assert store.latest() == store.path(100)


def test_without_checkpoints_there_is_no_latest(store, tmp_path):
    assert store.steps() == []
    assert store.latest() is None
    assert CheckpointStore(tmp_path / "never").latest() is None


def test_a_moved_model_dir_works(store, tmp_path):
    store.save(state_of(4))
    moved = CheckpointStore(shutil.move(store.model_dir, tmp_path / "elsewhere"))
    assert moved.latest() == tmp_path / "elsewhere" / "checkpoint-4"
    assert moved.load(moved.path(4)).model["w"].tolist() == [1.0] * 3


def test_loading_the_model_alone_does_not_open_the_optimizers_file(store):
    path = store.save(state_of(1))
    (path / "optimizer.safetensors").write_bytes(b"not read")
    state = store.load(path, optimizers=False)
    assert state.optimizers == {}
    assert state.model["w"].tolist() == [1.0] * 3
    with pytest.raises(CheckpointError, match=r"optimizer.safetensors is damaged"):
        store.load(path)


def test_delete_removes_the_checkpoint(store):
    store.save(state_of(1))
    store.save(state_of(2))
    store.delete(1)
    assert _names(store) == ["checkpoint-2"]
    with pytest.raises(CheckpointError, match=r"step 1 could not be deleted: .*No such file"):
        store.delete(1)


def test_prepare_deletes_what_a_killed_writer_left(store):
    store.save(state_of(1))
    shutil.copytree(store.path(1), store.model_dir / ".tmp-checkpoint-2-0123abcd")
    shutil.copytree(store.path(1), store.model_dir / ".del-checkpoint-0-0123abcd")
    store.prepare()
    assert _names(store) == ["checkpoint-1"]


def test_prepare_gives_a_checkpoint_back_that_was_moved_aside_and_not_replaced(store):
    os.replace(store.save(state_of(1, value=3.0)), store.model_dir / ".old-checkpoint-1-0123abcd")
    store.prepare()
    assert _names(store) == ["checkpoint-1"]
    assert store.load(store.path(1)).model["w"].tolist() == [3.0] * 3


def test_times_are_those_of_the_commits_and_of_the_first_one_ever(tmp_path):
    times = iter([10.0, 20.0, 30.0])
    store = CheckpointStore(tmp_path, clock=lambda: next(times))
    for step in (1, 2):
        store.save(state_of(step))
    store.delete(1)
    store.save(state_of(3))
    assert [(one.global_step, one.saved_at_seconds, one.started_at_seconds) for one in store.manifests()] == [
        (2, 20.0, 10.0), (3, 30.0, 10.0)]
    again = CheckpointStore(tmp_path, clock=lambda: 40.0)
    again.save(state_of(4))
    assert again.manifests()[-1].started_at_seconds == 10.0


def test_a_damaged_checkpoint_does_not_stop_the_next_save(store):
    store.save(state_of(1))
    (store.save(state_of(2)) / "state.json").write_text("{")
    store.save(state_of(3))
    assert [manifest.global_step for manifest in store.manifests()] == [1, 3]
