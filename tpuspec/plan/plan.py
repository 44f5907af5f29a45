"""A plan: what the compiler says of the programs of a run, for chips that are not there."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tpuspec.errors import TpuspecError
from tpuspec.plan.chips import Chip
from tpuspec.plan.table import format_bytes
from tpuspec.spec.engine import CompiledFacts

_KINDS = {"parameter": "parameters", "optimizer": "optimizer state", "hyper-parameter": "optimizer state",
          "buffer": "buffers", "attribute": "buffers", "gradient": "gradients", "batch": "batch"}
_NUM_LARGEST = 5
_REFUSED = re.compile(r"(?:Used |required for HLO temporaries \()([\d.]+)([KMGT])\)?.{1,40}?([\d.]+)([KMGT])")
"""The two ways in which libtpu says how much memory a program needs, and how much there is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModePlan:
    """One mode's program on one device. All bytes, operations and seconds are of one device and one run of the program.

    Attributes:
      mode: 'train', 'eval' or 'predict'.
      compiles: whether the compiler takes it.
      fits: whether it compiles and needs no more memory than there is.
      reason: the compiler's, where it does not compile; "" else.
      argument_bytes: by kind: parameters, optimizer state, buffers, gradients, batch, other.
      output_bytes, aliased_bytes: of the outputs, and of those that lie where inputs lay.
      temporary_bytes: besides inputs and outputs.
      program_bytes: of the code.
      peak_bytes: of all of that at once; where the compiler refuses, what it says that is needed, if it does.
      capacity_bytes: of the device; None where the chip is not known.
      largest: the largest inputs, (name, bytes).
      largest_temporaries: the largest results of operations in between, (what, bytes), not all of them at one time.
      flops, accessed_bytes: arithmetic operations, and bytes read and written in memory.
      collectives: kind -> (how many, bytes of their results).
      steps_per_program: training steps of one run of the program.
      rows: of the global batch of a step.
      num_tried: batches that were compiled for, to find the largest one that fits; 0 where this one was given.
      rows_too_many: of the smallest of them that does not fit, where a larger one does; None else.
      compute_seconds, memory_seconds, link_seconds: what the device needs at least for the operations, for memory and
        for the links, at its peak speeds; None where the chip is not known.
      compile_seconds: on this machine.
    """

    mode: str
    compiles: bool
    fits: bool
    reason: str = ""
    argument_bytes: Mapping[str, int] = field(default_factory=dict)
    output_bytes: int = 0
    aliased_bytes: int = 0
    temporary_bytes: int = 0
    program_bytes: int = 0
    peak_bytes: int = 0
    capacity_bytes: int | None = None
    largest: Sequence[tuple[str, int]] = ()
    largest_temporaries: Sequence[tuple[str, int]] = ()
    flops: float = 0.0
    accessed_bytes: float = 0.0
    collectives: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    steps_per_program: int = 1
    rows: int = 0
    num_tried: int = 0
    rows_too_many: int | None = None
    compute_seconds: float | None = None
    memory_seconds: float | None = None
    link_seconds: float | None = None
    compile_seconds: float = 0.0

    @property
    def least_seconds(self) -> float | None:
        """A lower bound of the time of one step; None where the chip is not known."""
        parts = (self.compute_seconds, self.memory_seconds, self.link_seconds)
        return None if None in parts else max(part for part in parts if part is not None) / self.steps_per_program

    @property
    def bound_by(self) -> str:
        """Which of compute, memory and links takes longest."""
        parts = {"compute": self.compute_seconds, "memory": self.memory_seconds, "links": self.link_seconds}
        return max(parts, key=lambda name: parts[name] or 0.0)

    @property
    def most_examples_per_second(self) -> float | None:
        """An upper bound of the rows a second, all chips together."""
        seconds = self.least_seconds
        return self.rows / seconds if seconds else None

    @classmethod
    def of(cls, mode: str, facts: CompiledFacts, inputs: Sequence[tuple[str, str]], chip: Chip | None,
           devices_per_chip: int, rows: int, steps: int) -> ModePlan:
        """Makes the plan of a mode.

        Args:
          mode: its name.
          facts: of its program.
          inputs: (kind, name) of each input.
          chip: of the topology.
          devices_per_chip: devices that share a chip.
          rows, steps: of the global batch, and of a run of the program.
        """
        by_kind: dict[str, int] = {}
        for (kind, _), size in zip(inputs, facts.argument_bytes, strict=True):
            name = _KINDS.get(kind, "other")
            by_kind[name] = by_kind.get(name, 0) + size
        named = sorted(((name or kind, size) for (kind, name), size in zip(inputs, facts.argument_bytes, strict=True)),
                       key=lambda one: -one[1])
        capacity = None if chip is None else int(chip.memory_bytes / devices_per_chip)
        peak = (sum(facts.argument_bytes) + facts.output_bytes - facts.aliased_bytes + facts.temporary_bytes
                + facts.program_bytes)
        if facts.reason and (refused := _REFUSED.search(facts.reason)) is not None:
            needed, there = _parse_bytes(*refused.groups()[:2]), _parse_bytes(*refused.groups()[2:])
            peak, capacity = max(peak, needed), there
        link_bytes = sum(size for _, size in facts.collectives.values())
        return cls(
            mode=mode, compiles=not facts.reason,
            fits=not facts.reason and (capacity is None or peak <= capacity), reason=_short(facts.reason, facts.place),
            argument_bytes=by_kind, output_bytes=facts.output_bytes, aliased_bytes=facts.aliased_bytes,
            temporary_bytes=facts.temporary_bytes, program_bytes=facts.program_bytes, peak_bytes=peak,
            capacity_bytes=capacity, largest=named[:_NUM_LARGEST],
            largest_temporaries=facts.temporaries, flops=facts.flops,
            accessed_bytes=facts.accessed_bytes, collectives=facts.collectives, steps_per_program=steps, rows=rows,
            compute_seconds=None if chip is None else facts.flops / (chip.flops / devices_per_chip),
            memory_seconds=None if chip is None else facts.accessed_bytes / (chip.memory_bandwidth / devices_per_chip),
            link_seconds=None if chip is None else link_bytes / (chip.link_bandwidth / devices_per_chip),
            compile_seconds=facts.seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run would need on a topology of chips.

    Attributes:
      topology: its name, such as 'v5e:2x2'.
      chip: its kind, as the compiler names it.
      num_chips, num_devices: of the topology; a chip of some generations is two devices.
      layout: how the run uses them: replicas, or a mesh.
      compiler: that compiled the programs, libtpu with its version.
      modes: of each mode.
      notes: what to mind.
    """

    topology: str
    chip: str
    num_chips: int
    num_devices: int
    layout: str
    modes: tuple[ModePlan, ...]
    compiler: str = ""
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether every mode compiles, and needs no more memory than there is."""
        return all(mode.fits for mode in self.modes)

    def as_dict(self) -> dict[str, Any]:
        """Returns all of it as plain values."""
        values: dict[str, Any] = dataclasses.asdict(self)
        for of_mode, mode in zip(values["modes"], self.modes, strict=True):
            of_mode |= {"least_seconds": mode.least_seconds,
                        "most_examples_per_second": mode.most_examples_per_second}
        return {**values, "fits": self.fits}


class PlanError(TpuspecError, RuntimeError):
    """A run does not fit the chips that it was planned for."""


def check_fits(plans: Sequence[Plan]) -> None:
    """Checks that all plans fit.

    Raises:
      PlanError: one does not; says by how much.
    """
    for plan in plans:
        for mode in plan.modes:
            if mode.fits:
                continue
            told = f"mode {mode.mode} does not fit {plan.topology}"
            if mode.capacity_bytes is not None and mode.peak_bytes > mode.capacity_bytes:
                largest = ", ".join(f"{name} ({format_bytes(size)})" for name, size in mode.largest[:3])
                raise PlanError(
                    f"{told}: a device would need {format_bytes(mode.peak_bytes)} of memory and has "
                    f"{format_bytes(mode.capacity_bytes)}. Its largest inputs are {largest}. Take more or larger "
                    "chips, a smaller batch, accumulate_steps, bf16-mixed, or fsdp on a mesh.")
            raise PlanError(f"{told}: the compiler refuses it: {mode.reason}")


def _parse_bytes(number: str, unit: str) -> int:
    return int(float(number) * 1024 ** ("KMGT".index(unit) + 1))


def _short(reason: str, place: str) -> str:
    """Returns what the compiler says first, without the lines that only its makers read, and the user's line."""
    lines = [line.strip() for line in reason.partition("Suspected Python Code Location")[0].splitlines()]
    told = " ".join([line for line in lines if line][:3])[:400]
    return f"{told} (at {place})" if place else told
