"""Generations of TPU chips: their memory and peak speeds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Chip:
    """A generation; figures of one chip.

    Attributes:
      memory_bytes: of its HBM.
      flops: bfloat16 operations a second.
      memory_bandwidth: of its HBM, bytes a second.
      link_bandwidth: of its links to other chips, all together and in both directions, bytes a second.
    """

    memory_bytes: float
    flops: float
    memory_bandwidth: float
    link_bandwidth: float


_GIB = float(1 << 30)

CHIPS = {
    "v4": Chip(32 * _GIB, 275e12, 1228e9, 600e9),
    "v5e": Chip(16 * _GIB, 197e12, 819e9, 400e9),
    "v5p": Chip(95 * _GIB, 459e12, 2765e9, 1200e9),
    "v6e": Chip(32 * _GIB, 918e12, 1638e9, 800e9),
    "tpu7x": Chip(192 * _GIB, 2307e12, 7380e9, 1200e9),
}
"""By the first part of a topology's name. Source: the page of each generation at cloud.google.com/tpu/docs, "System
architecture", peak compute, HBM capacity and bandwidth, bidirectional inter-chip interconnect bandwidth."""


def chip_of(topology: str) -> Chip | None:
    """Returns the generation of a topology such as 'v5e:2x2'; None where its figures are not known."""
    return CHIPS.get(topology.partition(":")[0].lower())
