"""Is a step that the Trainer compiles for a TPU as good as the same step by hand in JAX, by the compiler's account?

    python benchmarks/bench_tpu_program.py [--cases gpt2 gpt2-fsdp resnet50 llama-7b-fsdp]

Needs no TPU: libtpu compiles both for chips that are not there. Nothing is timed, so the numbers are exact. For each
case and side one JSON line: what one chip reads and writes in memory, temporaries, memory at most, results of
collectives, all in bytes; copies in the compiled program. A second line has the ratios, Trainer to JAX.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
               "TPU_WORKER_HOSTNAMES": "localhost", "TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3"}

from tpu_programs.cases import BETAS, CASES, EPSILON, LARGEST_NORM, LEARNING_RATE, WEIGHT_DECAY, Case, ResNet

_COPY = re.compile(r"^\s*(?:ROOT )?%\S+ = .*?\b(?:copy|copy-start)\(", re.MULTILINE)


def facts_of(compiled: Any) -> dict[str, int]:
    """Returns what the compiler says of a program, for one chip."""
    from tpuspec.engine.compiled_text import count_collectives

    memory, text = compiled.memory_analysis(), compiled.as_text()
    collectives = count_collectives(text)
    return {
        "accessed_bytes": int(compiled.cost_analysis()["bytes accessed"]),
        "temporary_bytes": memory.temp_size_in_bytes,
        "peak_bytes": (memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
                       + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes),
        "collective_bytes": sum(size for _, size in collectives.values()),
        "collectives": sum(count for count, _ in collectives.values()),
        "copies": len(_COPY.findall(text)), "flops": int(compiled.cost_analysis()["flops"])}


def jax_by_hand(case: Case) -> Any:
    """Compiles the step written in JAX."""
    from tpu_programs.jax_steps import lower

    return lower(case).compile()


def tpuspec_trainer(case: Case) -> Any:
    """Compiles the Trainer's step."""
    import jax
    import torch
    from tpu_programs.torch_models import MODELS, loss_of

    import tpuspec

    def model_fn(features: Any, labels: Any, mode: str, params: Any, model: Any, optimizer: Any) -> Any:
        loss = loss_of(model(features), labels)
        return tpuspec.TPUEstimatorSpec(mode, loss=loss, train_op=tpuspec.CrossShardOptimizer(optimizer).minimize(
            loss, clip_grad_norm=LARGEST_NORM))

    def input_fn(params: Any) -> Any:
        rows, sizes = params["batch_size"], case.sizes
        if isinstance(sizes, ResNet):
            yield torch.zeros(rows, 3, sizes.size, sizes.size), torch.zeros(rows, dtype=torch.int64)
        else:
            yield (torch.zeros(rows, sizes.length, dtype=torch.int64),) * 2

    trainer = tpuspec.Trainer(
        model_fn, model=lambda params: MODELS[case.model](case.sizes), train_batch_size=case.rows,
        optimizer=lambda model, params: torch.optim.AdamW(
            model.parameters(), lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, weight_decay=WEIGHT_DECAY),
        config=tpuspec.RunConfig(precision="bf16-mixed", show_progress=False, tpu_config=tpuspec.TPUConfig(
            **({"num_shards": 1} if case.fsdp == 1 else {"mesh": {"data": case.fsdp}, "fsdp": True}))))
    kept: list[Any] = []
    compile_for_chips = jax.stages.Lowered.compile

    def keeping(lowered: Any, *args: Any, **named: Any) -> Any:
        kept.append(compile_for_chips(lowered, *args, **named))
        return kept[-1]

    jax.stages.Lowered.compile = keeping  # type: ignore[method-assign]
    trainer.plan(input_fn, topology=case.topology)
    return kept[-1]


SIDES = {"tpuspec_trainer": tpuspec_trainer, "jax_by_hand": jax_by_hand}


def measure(case: str, side: str, text: str | None = None) -> dict[str, int]:
    """Compiles one side of a case in a process of its own."""
    command = [sys.executable, __file__, "--cases", case, "--side", side, *(["--text", text] if text else [])]
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(ran.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--side", choices=SIDES, help="compiles one side of one case in this process")
    parser.add_argument("--text", help="writes the compiled program of --side there")
    given = parser.parse_args()
    if given.side:
        compiled = SIDES[given.side](CASES[given.cases[0]])
        if given.text:
            with open(given.text, "w") as file:
                file.write(compiled.as_text())
        print(json.dumps(facts_of(compiled)), flush=True)
        os._exit(0)  # libtpu takes its time to end
    for case in given.cases:
        found = {side: measure(case, side) for side in SIDES}
        for side, facts in found.items():
            print(json.dumps({"benchmark": "tpu_program", "case": case, "side": side, **facts}), flush=True)
        ours, theirs = found["tpuspec_trainer"], found["jax_by_hand"]
        print(json.dumps({"benchmark": "tpu_program", "case": case, "ratio": {
            name: round(ours[name] / theirs[name], 3) for name in ours if theirs[name]}}), flush=True)


if __name__ == "__main__":
    main()
