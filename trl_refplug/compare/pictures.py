"""Pictures of the runs: the curves of loss and reward margin, and the costs of each provider."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from trl_refplug.compare.comparison import format_bytes
from trl_refplug.compare.demo import DemoResult
from trl_refplug.compare.job import Run


# Okabe and Ito's colors, which can be told apart with any kind of color vision.
COLORS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000"]
GREY = "0.78"
WIDTH = 9.0  # inches, of 150 dots each; a README shows them at about 60 % of that size


def draw_demo_curves(result: DemoResult, path: Path) -> None:
    """Draw the demo's loss and reward margin, and where they began and ended, as a PNG."""
    figure, panels = _curve_panels(3.4)
    starts = [(math.log(2), "ln 2", "#2a6fbb", result.heldout_loss), (0.0, "0", "#c2571a", result.heldout_margin)]
    for (axes, name), (start, start_name, color, heldout) in zip(panels, starts, strict=True):
        numbers = [step.step for step in result.steps]
        axes.axhline(start, color="0.6", linewidth=1, linestyle="--", label=f"policy = reference ({start_name})")
        axes.plot(
            numbers, [getattr(step, name) for step in result.steps], color=color, linewidth=2, label="training pairs"
        )
        axes.plot(numbers[-1], heldout, "D", color="black", markersize=6, label="held-out pairs, at the end", zorder=3)
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)


def draw_curves(runs: list[Run], path: Path) -> None:
    """Draw the loss and reward margin of all runs over each other, as a PNG."""
    figure, panels = _curve_panels(3.8)
    # Curves of runs that agree lie on each other. The first is the widest, so that all of them remain visible.
    widths = np.linspace(2 + 2.5 * (len(runs) - 1), 1.6, len(runs))
    for axes, name in panels:
        for position, (run, width) in enumerate(zip(runs, widths, strict=True)):
            axes.plot(
                [step.step for step in run.steps],
                [getattr(step, name) for step in run.steps],
                color=COLORS[position % len(COLORS)],
                linewidth=width,
                solid_capstyle="round",
                label=run.choice.label,
            )
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(runs)), frameon=False)
    figure.savefig(path)


def _curve_panels(height: float) -> tuple[Figure, list[tuple[Any, str]]]:
    """A figure with two empty panels for curves. Each panel comes with the name of the [`Step`] field it is for."""
    figure = Figure(figsize=(WIDTH, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(1, 2))
    for axes, title in zip(panels, ("DPO loss", "Reward margin"), strict=True):
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(zip(panels, ("loss", "margin"), strict=True))


def draw_costs(runs: list[Run], path: Path) -> None:
    """Draw step time, time before the first step, peak memory, and bytes stored and sent, as a PNG."""
    figure = Figure(figsize=(WIDTH, 1.7 + 0.62 * len(runs)), dpi=150, layout=ConstrainedLayoutEngine(hspace=0.08))
    FigureCanvasAgg(figure)
    (step, before), (memory, stored) = figure.subplots(2, 2, sharey=True)

    policy, reference = ([getattr(run, f"{name}_seconds") for run in runs] for name in ("policy", "reference"))
    parts = [BarPart("policy", policy, GREY), BarPart("reference", reference, COLORS[0])]
    _draw_bars(step, "Median step", parts, [f"{sum(both):.2f} s" for both in zip(policy, reference, strict=True)])
    seconds = [run.seconds_before for run in runs]
    _draw_bars(before, "Before the first step", [BarPart("", seconds, GREY)], [f"{value:.1f} s" for value in seconds])
    peaks = [run.peak_memory for run in runs]
    _draw_bars(memory, "Peak memory", [BarPart("", peaks, COLORS[1])], [f"{peak / 2**30:.2f} GiB" for peak in peaks])
    disk, wire = ([getattr(run, f"{name}_bytes") or 0 for run in runs] for name in ("disk", "wire"))
    totals = [sum(both) for both in zip(disk, wire, strict=True)]
    parts = [BarPart("on disk", disk, COLORS[2]), BarPart("on the wire", wire, COLORS[3])]
    _draw_bars(
        stored,
        "Stored or sent",
        [part for part in parts if any(part.values)],
        [format_bytes(total) if total else "nothing" for total in totals],
    )
    step.set_yticks(range(len(runs)), ["\n".join(textwrap.wrap(run.choice.label, 20)) for run in runs])
    step.invert_yaxis()
    figure.savefig(path)


class BarPart(NamedTuple):
    """One part of every bar of a panel, with one value for each bar."""

    label: str
    values: Sequence[float]
    color: str


def _draw_bars(axes: Any, title: str, parts: list[BarPart], totals: list[str]) -> None:
    """Draw one horizontal bar for each run, made of stacked parts, with the total beside it."""
    ends = np.zeros(len(totals))
    for part in parts:
        axes.barh(range(len(totals)), part.values, 0.66, left=ends, color=part.color, label=part.label)
        ends += part.values
    for position, (end, total) in enumerate(zip(ends, totals, strict=True)):
        axes.annotate(total, (end, position), (4, 0), textcoords="offset points", va="center")
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlim(0, max(ends.max(), 1e-9) * 1.25)  # this leaves room for the totals
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    if any(part.label for part in parts):
        axes.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 0.98), borderaxespad=0, ncols=2)
