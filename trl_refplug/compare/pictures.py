"""The runs as two pictures: what was learned, and what it cost."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from trl_refplug.compare.report import shown_bytes
from trl_refplug.compare.run import Run


# Okabe and Ito's colours: told apart with any kind of colour vision.
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000"]
GREY = "0.78"
WIDTH = 9.0  # inches; at 150 dots each they are shown at about 60 % in a README


def draw_curves(runs: list[Run], path: Path) -> None:
    """Loss and reward margin of all runs, over each other, as a PNG."""
    figure = Figure(figsize=(WIDTH, 3.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    # Runs that agree lie on each other: the first is the widest, so that all of them remain visible.
    widths = np.linspace(2 + 2.5 * (len(runs) - 1), 1.6, len(runs))
    for axes, title, name in zip(panels, ("DPO loss", "Reward margin"), ("loss", "margin"), strict=True):
        for place, (run, width) in enumerate(zip(runs, widths, strict=True)):
            axes.plot(
                [step.step for step in run.steps],
                [getattr(step, name) for step in run.steps],
                color=COLOURS[place % len(COLOURS)],
                linewidth=width,
                solid_capstyle="round",
                label=run.contender.label,
            )
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set_xlabel("optimiser step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(runs)), frameon=False)
    figure.savefig(path)


def draw_costs(runs: list[Run], path: Path) -> None:
    """Seconds of a step and before the first one, peak memory, bytes stored and sent, as a PNG."""
    figure = Figure(figsize=(WIDTH, 1.7 + 0.62 * len(runs)), dpi=150, layout=ConstrainedLayoutEngine(hspace=0.08))
    FigureCanvasAgg(figure)
    (step, before), (memory, stored) = figure.subplots(2, 2, sharey=True)

    policy, reference = ([getattr(run, f"{name}_seconds") for run in runs] for name in ("policy", "reference"))
    parts = [Part("policy", policy, GREY), Part("reference", reference, COLOURS[0])]
    _bars(step, "Median step", parts, [f"{sum(both):.2f} s" for both in zip(policy, reference, strict=True)])
    seconds = [run.seconds_before for run in runs]
    _bars(before, "Before the first step", [Part("", seconds, GREY)], [f"{value:.1f} s" for value in seconds])
    bytes_used = [run.peak_memory for run in runs]
    _bars(
        memory, "Peak memory", [Part("", bytes_used, COLOURS[1])], [f"{size / 2**30:.2f} GiB" for size in bytes_used]
    )
    disk, wire = ([getattr(run, f"{name}_bytes") or 0 for run in runs] for name in ("disk", "wire"))
    totals = [sum(both) for both in zip(disk, wire, strict=True)]
    parts = [Part("on disk", disk, COLOURS[2]), Part("on the wire", wire, COLOURS[3])]
    _bars(
        stored,
        "Stored or sent",
        [part for part in parts if any(part.values)],
        [shown_bytes(total) if total else "nothing" for total in totals],
    )
    step.set_yticks(range(len(runs)), ["\n".join(textwrap.wrap(run.contender.label, 20)) for run in runs])
    step.invert_yaxis()
    figure.savefig(path)


class Part(NamedTuple):
    """One part of every bar of a panel."""

    label: str
    values: Sequence[float]
    colour: str


def _bars(axes: Any, title: str, parts: list[Part], totals: list[str]) -> None:
    """Horizontal bars, one a run, of stacked parts, with the total beside each."""
    ends = np.zeros(len(totals))
    for part in parts:
        axes.barh(range(len(totals)), part.values, 0.66, left=ends, color=part.colour, label=part.label)
        ends += part.values
    for place, (end, total) in enumerate(zip(ends, totals, strict=True)):
        axes.annotate(total, (end, place), (4, 0), textcoords="offset points", va="center")
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlim(0, max(ends.max(), 1e-9) * 1.25)  # room for the totals
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    if any(part.label for part in parts):
        axes.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 0.98), borderaxespad=0, ncols=2)
