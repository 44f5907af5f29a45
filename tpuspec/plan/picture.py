"""Plans as a picture: memory of one device by kind against what there is, and the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tpuspec.plan.table import format_bytes

if TYPE_CHECKING:
    from tpuspec.plan.plan import ModePlan, Plan

_COLORS = {
    "parameters": "#4269d0", "optimizer state": "#efb118", "buffers": "#9c6b4e", "gradients": "#a463f2",
    "batch": "#3ca951", "other": "#9498a0", "outputs besides": "#97bbf5", "temporaries": "#ff725c",
    "program": "#6cc5b0", "needed, as the compiler says": "#d9d9d9"}
_OF_TOPOLOGIES = ("#4269d0", "#ff725c", "#3ca951", "#efb118", "#a463f2", "#6cc5b0", "#9c6b4e", "#9498a0")
_MARKERS = {"train": "o", "eval": "s", "predict": "^"}
_NEAR = 0.1
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def write_picture(plans: Sequence[Plan], path: str) -> bool:
    """Writes plans as a PNG.

    Args:
      plans: of several topologies.
      path: of the file.

    Returns:
      Whether it was written: it needs matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # costs half a second
        from matplotlib.figure import Figure
    except ImportError:
        return False
    num_bars = sum(len(plan.modes) for plan in plans)
    figure = Figure(figsize=(14, max(4.5, 2.4 + 0.55 * num_bars)), dpi=120, layout="constrained")
    memory, roofline = figure.subplots(1, 2, width_ratios=[1.15, 1])
    _draw_memory(memory, plans)
    _draw_roofline(roofline, plans)
    FigureCanvasAgg(figure).print_png(path)
    return True


def _draw_memory(axes: Any, plans: Sequence[Plan]) -> None:
    modes = [(plan, mode) for plan in plans for mode in plan.modes]
    most = max(mode.peak_bytes for _, mode in modes) or 1
    capacities = [mode.capacity_bytes for _, mode in modes if mode.capacity_bytes is not None]
    shows_capacity = bool(capacities) and most > _NEAR * max(capacities)
    most = max([most, *capacities]) if shows_capacity else most
    power = min(sum(most >= 1024 ** i for i in range(1, 5)), 4)
    unit = 1024 ** power
    for place, (_, mode) in enumerate(modes):
        start = 0.0
        for kind, size in _parts(mode).items():
            axes.barh(place, size / unit, left=start, height=0.6, color=_COLORS[kind])
            start += size / unit
        if mode.capacity_bytes is not None:
            if shows_capacity:
                axes.plot([mode.capacity_bytes / unit] * 2, [place - 0.3, place + 0.3], color="black", linewidth=2)
            text = (f"{format_bytes(mode.peak_bytes)} of {format_bytes(mode.capacity_bytes)}"
                    f"{'' if mode.fits else ', does not fit'}")
            axes.text(0.01 * most / unit, place - 0.36, text, va="bottom", fontsize=8)
    axes.set_yticks(range(len(modes)), [f"{plan.topology}\n{mode.mode}" for plan, mode in modes])
    axes.set_ylim(len(modes) - 0.4, -0.75)
    axes.set_xlim(0, 1.04 * most / unit)
    axes.set_xlabel(f"{_UNITS[power]} of one device" + (
        "; black line: what it has" if shows_capacity else "; what it has is far to the right"))
    axes.set_title("Memory", loc="left")
    kinds = [kind for kind in _COLORS if any(_parts(mode).get(kind) for _, mode in modes)]
    axes.legend([_patch(_COLORS[kind]) for kind in kinds], kinds, loc="upper center", bbox_to_anchor=(0.5, -0.13),
                ncols=3, frameon=False, fontsize=8)


def _patch(color: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=color)


def _parts(mode: ModePlan) -> dict[str, float]:
    """Returns the bytes of each kind."""
    parts = {**mode.argument_bytes, "outputs besides": mode.output_bytes - mode.aliased_bytes,
             "temporaries": mode.temporary_bytes, "program": mode.program_bytes}
    parts = {kind: parts.get(kind, 0) for kind in _COLORS}
    parts["needed, as the compiler says"] = max(0, mode.peak_bytes - sum(parts.values()))
    return {kind: size for kind, size in parts.items() if size > 0}


def _draw_roofline(axes: Any, plans: Sequence[Plan]) -> None:
    points = []
    for color, plan in zip(_OF_TOPOLOGIES * (1 + len(plans) // len(_OF_TOPOLOGIES)), plans, strict=False):
        points += [(color, plan, mode) for mode in plan.modes
                   if mode.flops and mode.accessed_bytes and mode.compute_seconds and mode.memory_seconds]
    axes.set_title("Roofline: bounds from peak speeds, nothing was measured", loc="left")
    axes.set_xlabel("operations a byte of memory traffic")
    axes.set_ylabel("operations a second of one device")
    if not points:
        axes.text(0.5, 0.5, "no step that compiles for a chip\nwhose speeds are known", ha="center", va="center",
                  transform=axes.transAxes)
        return
    intensities = [mode.flops / mode.accessed_bytes for _, _, mode in points]
    ridges = [_peaks(mode)[0] / _peaks(mode)[1] for _, _, mode in points]
    left, right = min(intensities) / 10, max(*intensities, *ridges) * 10
    roofs: dict[str, tuple[str, float, float]] = {}
    for (color, plan, mode), intensity in zip(points, intensities, strict=True):
        roofs.setdefault(plan.topology, (color, *_peaks(mode)))
        axes.plot(intensity, mode.flops / (mode.least_seconds * mode.steps_per_program), _MARKERS[mode.mode],
                  color=color, markersize=8, markeredgecolor="black",
                  label=f"{plan.topology} {mode.mode}: bound by {mode.bound_by}")
    for name, (color, peak, bandwidth) in roofs.items():
        axes.plot([left, peak / bandwidth, right], [left * bandwidth, peak, peak], color=color, linewidth=1.5,
                  label=f"{name}: {peak / 1e12:,.0f} TFLOP/s, {bandwidth / 1e9:,.0f} GB/s")
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter("")
    axes.grid(visible=True, which="major", color="#e5e5e5")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False, fontsize=8)


def _peaks(mode: ModePlan) -> tuple[float, float]:
    """Returns the operations and the bytes a second of a device."""
    assert mode.compute_seconds and mode.memory_seconds, "as was looked after"
    return mode.flops / mode.compute_seconds, mode.accessed_bytes / mode.memory_seconds
