"""torchrun starts the command; the environment says who is who."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

import tpuspec
from tpuspec.errors import ConfigError
from tpuspec.train import main

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID",
         "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_PROCID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID",
         "SLURM_STEP_ID")


@pytest.fixture
def environment(monkeypatch):
    """Sets variables; those of a launch that are not named are not there."""
    def set_to(**values):
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_to


def test_a_process_alone_is_the_chief(environment):
    environment()
    info = tpuspec.launch_info()
    assert (info.launcher, info.host_index, info.num_hosts, info.is_chief, info.chief_address) == (
        "alone", 0, 1, True, None)


def test_torchruns_variables_say_who_is_who(environment):
    environment(RANK="3", WORLD_SIZE="4", LOCAL_RANK="1", MASTER_ADDR="node0", MASTER_PORT="29500",
                TORCHELASTIC_RUN_ID="x")
    info = tpuspec.launch_info()
    assert (info.launcher, info.host_index, info.num_hosts, info.local_rank, info.is_chief, info.chief_address) == (
        "torchrun", 3, 4, 1, False, "node0:29500")


def test_a_task_of_slurm_that_says_its_rank_is_one_of_several(environment):
    environment(RANK="5", WORLD_SIZE="8", MASTER_ADDR="node0", MASTER_PORT="29500", SLURM_LOCALID="2",
                SLURM_STEP_NUM_TASKS="8")
    info = tpuspec.launch_info()
    assert (info.launcher, info.host_index, info.num_hosts, info.local_rank) == ("environment", 5, 8, 2)


SRUN = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "70000"}


@pytest.mark.parametrize(("nodes", "first"), [
    ("node07", "node07"), ("node07,node09", "node07"), ("node[07-09,12],other1", "node07"), ("n[3]-ib", "n3-ib"),
    ("rack-a[1,2]", "rack-a1")])
def test_sruns_variables_say_who_is_who(environment, nodes, first):
    environment(**SRUN, SLURM_STEP_NODELIST=nodes, SLURM_STEP_ID="0")
    info = tpuspec.launch_info()
    assert (info.launcher, info.host_index, info.num_hosts, info.local_rank, info.is_chief, info.chief_address) == (
        "srun", 2, 4, 1, False, f"{first}:{61440 + 70000 % 4096}")


def test_steps_of_a_job_have_ports_of_their_own_and_an_address_that_is_set_counts(environment):
    ports = set()
    for step in ("0", "1", "2"):
        environment(**SRUN, SLURM_STEP_NODELIST="node1", SLURM_STEP_ID=step)
        ports.add(tpuspec.launch_info().chief_address)
    assert len(ports) == 3
    environment(**SRUN, SLURM_STEP_NODELIST="node1", MASTER_ADDR="10.0.0.1", MASTER_PORT="29500")
    assert tpuspec.launch_info().chief_address == "10.0.0.1:29500"


def test_a_batch_script_that_srun_did_not_start_is_alone(environment):
    environment(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_JOB_ID="7")
    assert (tpuspec.launch_info().launcher, tpuspec.launch_info().num_hosts) == ("alone", 1)


def test_torchruns_one_process_is_the_chief(environment):
    environment(RANK="0", WORLD_SIZE="1", TORCHELASTIC_RUN_ID="x")
    info = tpuspec.launch_info()
    assert (info.launcher, info.num_hosts, info.is_chief, info.chief_address) == ("torchrun", 1, True, None)


SEVERAL = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(("variables", "message"), [
    ({"RANK": "0"}, "must be set both or neither; got RANK='0', WORLD_SIZE=None"),
    ({"WORLD_SIZE": "2"}, "must be set both or neither; got RANK=None, WORLD_SIZE='2'"),
    (SEVERAL | {"RANK": "2"}, r"a number in 0 \.\. WORLD_SIZE - 1; got RANK='2'"),
    (SEVERAL | {"RANK": "-1"}, r"a number in 0 \.\. WORLD_SIZE - 1; got RANK='-1'"),
    (SEVERAL | {"RANK": "one"}, r"a number in 0 \.\. WORLD_SIZE - 1; got RANK='one'"),
    (SEVERAL | {"WORLD_SIZE": "2.0"}, r"a number in 0 \.\. WORLD_SIZE - 1; .* WORLD_SIZE='2.0'"),
    (SEVERAL | {"WORLD_SIZE": "0"}, r"a number in 0 \.\. WORLD_SIZE - 1; .* WORLD_SIZE='0'"),
    ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE=2 are set, and MASTER_ADDR and MASTER_PORT not"),
    (SEVERAL | {"MASTER_ADDR": ""}, "WORLD_SIZE=2 are set, and MASTER_ADDR not.*torchrun sets all four"),
    (SEVERAL | {"MASTER_PORT": "http"}, r"MASTER_PORT must be a number in 0 \.\. 65535; got 'http'"),
    (SEVERAL | {"MASTER_PORT": "70000"}, r"MASTER_PORT must be a number in 0 \.\. 65535; got '70000'"),
    (SEVERAL | {"LOCAL_RANK": "gpu"}, "LOCAL_RANK must be a number; got 'gpu'"),
    (SEVERAL | {"SLURM_LOCALID": "-1"}, "SLURM_LOCALID must be a number; got '-1'"),
    ({"SLURM_STEP_NUM_TASKS": "4"}, r"srun started 4 tasks, and neither SLURM_PROCID nor RANK .*export RANK"),
    (SRUN | {"SLURM_PROCID": "4"}, r"SLURM_PROCID must be a number in 0 \.\. SLURM_STEP_NUM_TASKS - 1; got .*'4'"),
    (SRUN, "SLURM_STEP_NODELIST='' names no node: set MASTER_ADDR"),
    (SRUN | {"SLURM_STEP_NODELIST": "n1", "SLURM_JOB_ID": "x"}, "SLURM_JOB_ID='x' is no number: set MASTER_ADDR"),
])
def test_wrong_or_partial_variables_are_told(environment, variables, message):
    environment(**variables)
    with pytest.raises(ConfigError, match=message):
        tpuspec.launch_info()


@pytest.mark.parametrize("variables", [
    {"RANK": "0"}, SEVERAL | {"RANK": "5"}, SEVERAL | {"MASTER_ADDR": ""}, SEVERAL | {"MASTER_PORT": "http"},
    {"SLURM_STEP_NUM_TASKS": "4"}])
def test_the_command_ends_with_code_2_and_one_line_and_makes_nothing(environment, variables, tmp_path, capfd):
    environment(**variables)
    folder = tmp_path / "run"
    assert main(["config=digits", "device=cpu", f"model_dir={folder}"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "RANK" in line or "MASTER" in line
    assert not folder.exists()


@pytest.mark.slow
def test_torchrun_trains_evaluates_and_predicts_as_one(tmp_path):
    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
             "-m", "tpuspec.train", "config=digits", "device=cpu", f"model_dir={tmp_path}", *arguments],
            capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    output = run("run.max_steps=40", "run.save_checkpoints_steps=20")
    assert len(re.findall("evaluation of 360 rows at step 20", output)) == 1
    assert len(re.findall(r"^evaluation at step 40: accuracy 0\.[89]", output, re.MULTILINE)) == 1
    assert re.search(r"replicas +2", output)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-0", "checkpoint-20", "checkpoint-40"]
    run("mode=predict")
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == 360
    assert sum(json.loads(line)["classes"] in range(10) for line in lines) == 360
