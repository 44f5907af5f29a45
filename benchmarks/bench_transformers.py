"""What does a training step of BERT and GPT-2 of transformers cost in tpuspec, and in Accelerate on torch_xla?

    python benchmarks/bench_transformers.py [--repeats 5] [--steps 100]

Tiny models with padding masks, dropout, a linear warm-up from 0, clipping and bf16-mixed, on one XLA device, under
capture=require. Both have a process of their own and measure in turns. Prints a JSON line for each (median
milliseconds per step), then a table; a ratio above 1 says that the Trainer is faster.
pip install 'tpuspec[bench]' for both.
"""

from __future__ import annotations

import argparse
import contextlib

from bench_step import Measured, interleave, start_workers, table

CONTENDERS = ("transformers_trainer", "transformers_accelerate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100, help="of one measurement")
    arguments = parser.parse_args()
    results: list[Measured] = []
    with contextlib.ExitStack() as stack:
        workers = start_workers(CONTENDERS, stack)
        for name in ("bert", "gpt2") if workers else ():
            measured = interleave(workers, name, num_steps=arguments.steps, repeats=arguments.repeats)
            trainer = next((m for m in measured if m.contender == CONTENDERS[0]), None)
            for result in measured:
                print(result.line(trainer), flush=True)
            results += measured
    print(table(results, trainer=CONTENDERS[0]))


if __name__ == "__main__":
    main()
