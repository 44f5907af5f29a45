from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from tpuspec.config import InputPipelineConfig, RunConfig, TPUConfig
from tpuspec.data.deployment import plan_input, plan_native_input
from tpuspec.data.pipeline import HostBatch, InputPipeline, InputSettings
from tpuspec.errors import ConfigError, InputError, InputTypeError
from tpuspec.spec.backend import Topology
from tpuspec.spec.mode import ModeKeys
from tpuspec.spec.results import Batch
from tpuspec.testing import ManualClock

TRAIN, EVAL, PREDICT = ModeKeys.TRAIN, ModeKeys.EVAL, ModeKeys.PREDICT
PER_SHARD_V1, PER_HOST_V1 = InputPipelineConfig.PER_SHARD_V1, InputPipelineConfig.PER_HOST_V1
PER_HOST_V2, BROADCAST = InputPipelineConfig.PER_HOST_V2, InputPipelineConfig.BROADCAST
SLICED = InputPipelineConfig.SLICED


def pipeline(input_fn: Callable[..., Any], *, mode: ModeKeys = EVAL, deployment: InputPipelineConfig = PER_HOST_V1,
             batch_size: int = 4, replicas: int = 2, hosts: int = 1, host: int = 0,
             params: dict[str, Any] | None = None, sleep_secs: int | None = None,
             sleep: Callable[[float], None] | None = None, starts: list[dict[str, Any]] | None = None) -> InputPipeline:
    """Makes the input of one of `hosts` hosts that have `replicas` replicas in all."""
    where = {"eval_training_input_configuration": SLICED} if deployment is SLICED else {
        "per_host_input_for_training": deployment}
    config = RunConfig(tpu_config=TPUConfig(initial_infeed_sleep_secs=sleep_secs, **where))
    made = InputSettings(
        input_fn=input_fn, mode=mode, params={} if params is None else params, config=config, static_shapes=True,
        starts=starts,
        plan=plan_input(mode, config.tpu_config, global_batch_size=batch_size, num_hosts=hosts, num_replicas=replicas),
        topology=Topology(platform="CPU", devices=tuple(f"cpu:{i}" for i in range(replicas // hosts)),
                          num_replicas_per_host=replicas // hosts,
                          num_hosts=hosts, host_index=host))
    return InputPipeline(made) if sleep is None else InputPipeline(made, sleep=sleep)


def native(input_fn: Callable[..., Any], batch_size: int | None = None, sleep_secs: int | None = None,
           sleep: Callable[[float], None] = lambda _: None) -> InputPipeline:
    return InputPipeline(InputSettings(
        input_fn=input_fn, mode=EVAL, params={}, plan=plan_native_input(batch_size), static_shapes=False,
        config=RunConfig(tpu_config=TPUConfig(initial_infeed_sleep_secs=sleep_secs)), with_context=False,
        topology=Topology(platform="CPU", devices=("cpu",), num_replicas_per_host=1)), sleep=sleep)


def yields(*batches: list[float]) -> Callable[..., Any]:
    """Returns an input_fn that yields these rows, and their negatives as labels."""
    def input_fn(params: dict[str, Any]) -> Iterator[Any]:
        return ((torch.tensor(rows), -torch.tensor(rows)) for rows in batches)

    return input_fn


def dealt(batch: HostBatch) -> list[list[float]]:
    """Returns the features of each replica."""
    return [replica.features.tolist() for replica in batch.replicas]


def real_rows(batches: list[HostBatch]) -> list[float]:
    """Returns the features of all real rows, in replica order."""
    return [row for batch in batches
            for row in torch.cat([replica.features for replica in batch.replicas])[batch.rows.mask].tolist()]


def test_per_host_v1_deals_out_contiguous_slices_in_order():
    (batch,) = pipeline(yields([1.0, 2.0, 3.0, 4.0]))
    assert dealt(batch) == [[1, 2], [3, 4]]
    assert [replica.labels.tolist() for replica in batch.replicas] == [[-1, -2], [-3, -4]]
    assert batch.rows.mask.tolist() == [True] * 4


def test_per_host_v1_pads_behind_the_real_rows_of_the_whole_batch():
    full, short = pipeline(yields([1.0, 2.0, 3.0, 4.0], [5.0]))
    assert dealt(short) == [[5, 0], [0, 0]]
    assert short.rows.mask.tolist() == [True, False, False, False]
    assert (full.rows.num_rows, short.rows.num_rows) == (4, 1)


def test_batch_03_per_host_v2_draws_one_batch_a_replica_in_order():
    first, second = pipeline(yields([1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]), deployment=PER_HOST_V2)
    assert dealt(first) == [[1, 2], [3, 4]]
    assert dealt(second) == [[5, 6], [7, 8]]


def test_pred_07_per_host_v2_completes_a_partly_filled_step_with_padding():
    first, second = pipeline(yields([1.0, 2.0], [3.0, 4.0], [5.0]), deployment=PER_HOST_V2)
    assert dealt(second) == [[5, 0], [0, 0]]
    assert second.rows.mask.tolist() == [True, False, False, False]
    assert [replica.labels.tolist() for replica in second.replicas] == [[-5, 0], [0, 0]]
    assert first.rows.num_rows == 4


def test_batch_05_broadcast_gives_every_replica_all_rows_with_one_mask():
    full, short = pipeline(yields([1.0, 2.0, 3.0], [4.0]), deployment=BROADCAST, batch_size=3)
    assert dealt(full) == [[1, 2, 3], [1, 2, 3]]
    assert dealt(short) == [[4, 0, 0], [4, 0, 0]]
    assert short.rows.mask.tolist() == [True, False, False]


@pytest.mark.parametrize("mode", [EVAL, PREDICT])
def test_batch_06_sliced_splits_one_global_batch(mode):
    seen: list[int] = []

    def input_fn(params):
        seen.append(params["batch_size"])
        return iter([torch.arange(16.0)])

    (batch,) = pipeline(input_fn, mode=mode, deployment=SLICED, batch_size=16)
    assert seen == [16]
    assert dealt(batch) == [[*range(8)], [*range(8, 16)]]


def test_per_core_training_input_is_called_once_a_replica_and_feeds_it_alone():
    calls: list[tuple[int, int]] = []

    def input_fn(params, input_context):
        index = input_context.input_pipeline_id
        calls.append((index, params["batch_size"]))
        assert params["context"].current_input_fn_deployment() == ("host:0/cpu", index, 4, 1)
        return iter([torch.full((2,), float(index)), torch.full((2,), 10.0 + index)])

    first, second = pipeline(input_fn, mode=TRAIN, deployment=PER_SHARD_V1, batch_size=8, replicas=4)
    assert calls == [(0, 2), (1, 2), (2, 2), (3, 2)]
    assert dealt(first) == [[0, 0], [1, 1], [2, 2], [3, 3]]
    assert dealt(second) == [[10, 10], [11, 11], [12, 12], [13, 13]]


def test_input_fn_is_called_with_what_it_names():
    seen: dict[str, Any] = {}

    def input_fn(params, mode, config, input_context):
        seen.update(params=params, mode=mode, config=config, input_context=input_context)
        return iter([torch.ones(4)])

    next(pipeline(input_fn, params={"width": 3}))
    assert seen["mode"] is EVAL
    assert isinstance(seen["config"], RunConfig)
    assert seen["input_context"].num_replicas_in_sync == 2
    assert seen["params"].keys() == {"width", "batch_size", "context"}
    assert seen["params"]["context"].num_replicas == 2


def test_sig_06_what_input_fn_does_to_params_reaches_no_one():
    params = {"layers": [1, 2]}

    def input_fn(params):
        assert params["layers"] == [1, 2]
        params["layers"].append(3)
        params["own"] = 1
        return iter([torch.ones(2)])

    for _ in range(2):
        pipeline(input_fn, mode=TRAIN, params=params)
    assert params == {"layers": [1, 2]}


def test_what_input_fn_does_to_the_config_reaches_no_one():
    configs = []

    def input_fn(params, config):
        configs.append(config)
        assert config.save_summary_steps == 100
        config.save_summary_steps = 1
        return iter([torch.ones(2)])

    pipeline(input_fn, mode=TRAIN, deployment=PER_SHARD_V1)
    assert configs[0] is not configs[1]


def test_sig_01_an_input_fn_without_params_is_refused_before_it_is_called():
    def input_fn():
        pytest.fail("was called")

    with pytest.raises(ConfigError, match=r"input_fn \(.*input_fn\) does not include params argument"):
        pipeline(input_fn)


def test_predict_drops_the_labels():
    assert [replica.labels for replica in next(pipeline(yields([1.0, 2.0, 3.0, 4.0]), mode=PREDICT)).replicas] == [
        None, None]


def test_the_end_of_the_input_ends_the_batches_for_good():
    made = pipeline(yields([1.0, 2.0, 3.0, 4.0]))
    next(made)
    for _ in range(2):
        with pytest.raises(StopIteration, match="^$"):
            next(made)


@pytest.mark.parametrize("input_fn", [yields(), lambda params: TensorDataset(torch.ones(0, 2))])
@pytest.mark.parametrize("mode", [TRAIN, EVAL])
def test_an_empty_input_is_an_error(input_fn, mode):
    with pytest.raises(InputError, match="input_fn yielded no batches. The dataset is empty"):
        next(pipeline(input_fn, mode=mode))


def test_an_error_of_the_input_surfaces_as_itself_after_the_batches_before_it():
    def input_fn(params):
        yield torch.ones(4)
        raise KeyError("my row")

    made = pipeline(input_fn)
    next(made)
    with pytest.raises(KeyError, match="^'my row'$"):
        next(made)


def test_a_changed_shape_is_found_on_any_replicas_batch():
    def input_fn(params):
        return iter([torch.ones(2, 3), torch.ones(2, 4)])

    with pytest.raises(InputError, match=r"features changed from \[batch, 3\] to \[batch, 4\]"):
        next(pipeline(input_fn, deployment=PER_HOST_V2))


def test_a_short_training_batch_is_an_error():
    with pytest.raises(InputError, match=r"every training batch must have params\['batch_size'\]=4 rows; got 3"):
        next(pipeline(yields([1.0, 2.0, 3.0]), mode=TRAIN))


def test_training_on_per_host_v2_never_trains_on_padding():
    made = list(pipeline(yields([1.0, 2.0], [3.0, 4.0], [5.0, 6.0]), mode=TRAIN, deployment=PER_HOST_V2))
    assert all(batch.rows.mask.all() for batch in made)
    assert [dealt(batch) for batch in made] == [[[1, 2], [3, 4]]]


def test_training_on_per_core_input_never_trains_on_padding():
    def input_fn(params, input_context):
        return iter([torch.ones(2)] * (2 - input_context.input_pipeline_id))

    made = list(pipeline(input_fn, mode=TRAIN, deployment=PER_SHARD_V1))
    assert all(batch.rows.mask.all() for batch in made)
    assert len(made) == 1


def test_a_wrong_element_is_a_type_error():
    with pytest.raises(InputTypeError, match="features must be a tensor or an array"):
        next(pipeline(lambda params: ["a", "b"]))


def test_initial_infeed_sleep_waits_once_before_the_first_batch_is_drawn():
    clock, drawn_at = ManualClock(), []

    def input_fn(params):
        for _ in range(3):
            drawn_at.append(clock())
            yield torch.ones(4)

    made = pipeline(input_fn, sleep_secs=30, sleep=clock.advance)
    assert clock() == 0
    assert len(list(made)) == 3
    assert drawn_at == [30, 30, 30]


def test_without_xla_there_is_no_infeed_to_wait_for():
    clock = ManualClock()
    next(native(yields([1.0]), sleep_secs=30, sleep=clock.advance))
    assert clock() == 0


def test_without_xla_batches_of_any_size_pass_unpadded():
    made = list(native(yields([1.0, 2.0], [3.0, 4.0, 5.0], [6.0])))
    assert [dealt(batch) for batch in made] == [[[1, 2]], [[3, 4, 5]], [[6]]]
    assert [batch.rows.mask.tolist() for batch in made] == [[True] * 2, [True] * 3, [True]]


def test_batch_11_without_xla_params_hold_the_size_as_it_is_and_no_context():
    seen = []

    def input_fn(params):
        seen.append(dict(params))
        return iter([torch.ones(1)])

    native(input_fn, batch_size=127)
    native(input_fn)
    assert seen == [{"batch_size": 127}, {}]


def test_each_host_of_several_calls_input_fn_for_its_own_replicas():
    def input_fn(params):
        host = params["context"].current_host
        assert params["batch_size"] == 4
        return iter([torch.arange(4.0) + 10 * host])

    batches = [next(pipeline(input_fn, hosts=2, host=host, batch_size=8, replicas=4)) for host in range(2)]
    assert [dealt(batch) for batch in batches] == [[[0, 1], [2, 3]], [[10, 11], [12, 13]]]


@settings(deadline=None, max_examples=200)
@given(num_rows=st.integers(1, 40), per_replica=st.integers(1, 5), replicas=st.integers(1, 5),
       deployment=st.sampled_from([PER_HOST_V1, PER_HOST_V2, BROADCAST, SLICED]),
       mode=st.sampled_from([EVAL, PREDICT]))
def test_the_real_rows_of_all_steps_in_order_are_the_dataset(num_rows, per_replica, replicas, deployment, mode):
    rows = torch.arange(1.0, num_rows + 1)
    batch_size = per_replica * replicas
    made = list(pipeline(lambda params: TensorDataset(rows, -rows), mode=mode, deployment=deployment,
                         batch_size=batch_size, replicas=replicas))
    size = batch_size if deployment is BROADCAST else per_replica
    assert all(len(batch.replicas) == replicas for batch in made)
    assert {replica.features.shape for batch in made for replica in batch.replicas} == {(size,)}
    assert sum(batch.rows.num_rows for batch in made) == num_rows
    if deployment is BROADCAST:
        assert all(dealt(batch) == dealt(batch)[:1] * replicas for batch in made)
        made = [HostBatch(replicas=batch.replicas[:1], rows=batch.rows) for batch in made]
    assert real_rows(made) == rows.tolist()
    padding = [row for batch in made for row in torch.cat([r.features for r in batch.replicas])[~batch.rows.mask]]
    assert not any(padding)


@settings(deadline=None, max_examples=50)
@given(num_rows=st.integers(1, 40), per_replica=st.integers(1, 4), per_host=st.integers(1, 3), hosts=st.integers(1, 3),
       deployment=st.sampled_from([PER_HOST_V1, PER_HOST_V2]))
def test_hosts_that_shard_the_dataset_lose_and_repeat_no_row(num_rows, per_replica, per_host, hosts, deployment):
    rows = torch.arange(1.0, num_rows + 1)
    found: list[float] = []

    def input_fn(params):
        shard = rows[params["context"].current_host::hosts]
        return TensorDataset(shard, -shard)

    for host in range(min(hosts, num_rows)):
        found += real_rows(list(pipeline(
            input_fn, deployment=deployment, hosts=hosts, host=host,
            batch_size=per_replica * per_host * hosts, replicas=per_host * hosts)))
    assert sorted(found) == rows.tolist()


@settings(deadline=None, max_examples=50)
@given(num_rows=st.integers(1, 40), per_replica=st.integers(1, 4), per_host=st.integers(1, 3), hosts=st.integers(1, 3),
       deployment=st.sampled_from([PER_HOST_V1, PER_HOST_V2]))
def test_a_dataset_is_shared_out_over_hosts_that_do_not_ask_which_they_are(
        num_rows, per_replica, per_host, hosts, deployment):
    rows = torch.arange(1.0, num_rows + 1)
    made = [list(pipeline(
        lambda params: TensorDataset(rows, -rows), deployment=deployment, hosts=hosts, host=host,
        batch_size=per_replica * per_host * hosts, replicas=per_host * hosts)) for host in range(hosts)]
    assert len({len(batches) for batches in made}) == 1
    found = [row for step in zip(*made, strict=True) for batch in step for row in real_rows([batch])]
    assert found == rows.tolist()


def test_hosts_train_on_shares_of_the_batches_of_one_host():
    def draw(hosts, host, starts=None):
        batches = pipeline(lambda params: TensorDataset(torch.arange(20.0), torch.arange(20.0)), mode=TRAIN,
                           hosts=hosts, host=host, replicas=hosts, batch_size=6, starts=starts)
        drawn = [next(batches) for _ in range(7)]
        positions.append(drawn[3].position)
        return [batch.replicas[0].features.tolist() for batch in drawn]

    positions: list[list[dict[str, Any]]] = []
    alone = draw(1, 0)
    assert joined(draw(3, host) for host in range(3)) == alone
    assert all(position == positions[0] for position in positions)
    # Those of one host serve three, and the other way round.
    assert joined(draw(3, host, positions[0] * 3) for host in range(3))[:3] == alone[4:]
    assert draw(1, 0, positions[0] * 3)[:3] == alone[4:]


def joined(hosts):
    """The rows of each step, over all hosts."""
    return [[row for part in step for row in part] for step in zip(*hosts, strict=True)]


@settings(deadline=None, max_examples=50)
@given(num_batches=st.integers(1, 6), per_replica=st.integers(1, 4), replicas=st.integers(1, 4),
       deployment=st.sampled_from([PER_SHARD_V1, PER_HOST_V1, PER_HOST_V2, BROADCAST]))
def test_training_batches_reach_the_replicas_whole_and_in_order(num_batches, per_replica, replicas, deployment):
    def input_fn(params, input_context):
        size, shards = params["batch_size"], input_context.num_input_pipelines
        step = size * (replicas if deployment is PER_HOST_V2 else shards)
        rows = torch.arange(1.0, num_batches * step + 1).reshape(num_batches, -1)
        if deployment is PER_SHARD_V1:
            rows = rows[:, input_context.input_pipeline_id * size:(input_context.input_pipeline_id + 1) * size]
        return iter(rows.reshape(-1, size))

    made = list(pipeline(input_fn, mode=TRAIN, deployment=deployment, batch_size=per_replica * replicas,
                         replicas=replicas))
    assert len(made) == num_batches
    assert all(batch.rows.mask.all() for batch in made)
    copies = replicas if deployment is BROADCAST else 1
    rows = list(itertools.chain.from_iterable(
        replica.features.tolist() for batch in made for replica in batch.replicas[:len(batch.replicas) // copies]))
    assert rows == [float(i + 1) for i in range(num_batches * per_replica * replicas)]


class Named(torch.utils.data.Dataset):
    """Rows with a name, a remark that may be None, and an array of the other byte order."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> Any:
        return {"x": np.array([i], ">f4"), "name": f"row {i}", "remark": None if i % 2 else "even"}


def test_strings_of_the_features_stay_on_the_host_in_the_order_of_the_real_rows():
    batches = list(pipeline(lambda params: Named(), mode=PREDICT))
    assert [batch.kept["name"] for batch in batches] == [[f"row {i}" for i in rows] for rows in (range(4), (4, 5))]
    assert [batch.kept["remark"] for batch in batches] == [["even", None, "even", None], ["even", None]]
    assert [sorted(replica.features) for batch in batches for replica in batch.replicas] == [["x"]] * 4
    assert real_rows([HostBatch(replicas=[Batch(features=replica.features["x"][:, 0]) for replica in batch.replicas],
                                rows=batch.rows) for batch in batches]) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_strings_of_the_features_are_no_input_of_training():
    batch = next(pipeline(lambda params: Named(), mode=TRAIN))
    assert batch.kept == {"name": [], "remark": []} and sorted(batch.replicas[0].features) == ["x"]


@pytest.mark.parametrize(("second", "message"), [
    ({"x": torch.ones(4, 1)}, r"features\['name'\] must hold strings or None in every batch"),
    ({"x": torch.ones(4, 1), "name": ["a"]}, r"features\['name'\] must have one string a row; got 1 for 4 rows"),
])
def test_strings_must_be_one_a_row_in_every_batch(second, message):
    batches = pipeline(lambda params: [{"x": torch.ones(4, 1), "name": list("abcd")}, second], mode=PREDICT)
    next(batches)
    with pytest.raises(InputError, match=message):
        next(batches)


def test_rows_of_a_dataset_that_cannot_be_stacked_name_the_feature():
    rows = [({"x": torch.ones(1 + i % 2)}, torch.ones(1)) for i in range(8)]

    class Ragged(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, i: int) -> Any:
            return rows[i]

    with pytest.raises(InputTypeError, match=r"features\['x'\]: the rows of the Dataset cannot be stacked"):
        next(pipeline(lambda params: Ragged(), mode=PREDICT))
