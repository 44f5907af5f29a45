"""A plan as a table for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tpuspec.plan.plan import ModePlan, Plan

_LEAST_WIDTH = 72
_NUM_LARGEST = 3


def print_plan(plan: Plan) -> None:
    """Prints a plan, a column for each mode."""
    from rich.console import Console  # costs a tenth of a second
    from rich.table import Table

    chips = f"{plan.num_chips} chips" if plan.num_chips == plan.num_devices else (
        f"{plan.num_chips} chips, {plan.num_devices} devices")
    table = Table(title=f"{plan.topology} ({plan.chip}, {chips}), {plan.layout}", title_justify="left",
                  caption="of one device; times and rates are bounds from peak speeds, not measured",
                  caption_justify="left")
    table.add_column("")
    columns = [_column(mode) for mode in plan.modes]
    for mode in plan.modes:
        table.add_column(mode.mode, overflow="fold")
    for name in dict.fromkeys(name for column in columns for name in column):
        table.add_row(name, *(column.get(name, "") for column in columns))
    console = Console(highlight=False)
    console.width = max(console.width, _LEAST_WIDTH)
    console.print(table)
    for note in plan.notes:
        console.print(f"note: {note}")


def _column(mode: ModePlan) -> dict[str, str]:
    """Returns what is told of a mode, by the names of the rows."""
    told = {"fits": "yes" if mode.fits else "no" if mode.compiles else "no, the compiler refuses it"}
    told["rows of a step"] = f"{mode.rows:,}" + (
        f", the most of {mode.num_tried} tried; {mode.rows_too_many:,} do not fit" if mode.rows_too_many else
        f", the {'most' if mode.fits else 'fewest'} of {mode.num_tried} tried" if mode.num_tried else "")
    told |= {kind: format_bytes(size) for kind, size in sorted(mode.argument_bytes.items(), key=lambda one: -one[1])}
    if mode.compiles:
        told |= {"outputs besides": format_bytes(mode.output_bytes - mode.aliased_bytes),
                 "temporaries": format_bytes(mode.temporary_bytes), "program": format_bytes(mode.program_bytes)}
    if mode.peak_bytes and mode.capacity_bytes:
        told["memory"] = (f"{format_bytes(mode.peak_bytes)} of {format_bytes(mode.capacity_bytes)}, "
                          f"{mode.peak_bytes / mode.capacity_bytes:.0%}")
    for title, largest in (("largest inputs", mode.largest), ("largest temporaries", mode.largest_temporaries)):
        if largest:
            told[title] = "\n".join(f"{format_bytes(size)} {name}" for name, size in largest[:_NUM_LARGEST])
    if mode.compiles:
        told |= {"operations": f"{_prefixed(mode.flops)}FLOP", "memory traffic": format_bytes(mode.accessed_bytes),
                 "collectives": ", ".join(f"{count} {kind}, {format_bytes(size)}"
                                          for kind, (count, size) in sorted(mode.collectives.items())) or "none"}
        if mode.steps_per_program > 1:
            told["steps of a program"] = str(mode.steps_per_program)
        if mode.least_seconds is not None and mode.most_examples_per_second is not None:
            told["step, at least"] = f"{_prefixed(mode.least_seconds)}s, bound by {mode.bound_by}"
            told["examples/s, at most"] = f"{mode.most_examples_per_second:,.0f}"
    if mode.reason:
        told["the compiler says"] = mode.reason
    told["compiled in"] = f"{mode.compile_seconds:.1f} s"
    return told


def format_bytes(size: float) -> str:
    """Returns a size in three digits, such as 1.25 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"


def _prefixed(value: float) -> str:
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k"), (0, ""), (-3, "m"), (-6, "µ")):
        if value >= 10.0 ** power:
            return f"{value / 10.0 ** power:.3g} {prefix}"
    return f"{value * 1e9:.3g} n"
