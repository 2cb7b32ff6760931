"""The runs as two pictures: what was learned, and what it cost."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .run import Run


# Okabe and Ito's colours: told apart with any kind of colour vision.
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000"]
POLICY_COLOUR, REFERENCE_COLOUR = "0.78", "#0072B2"
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
    """Time of a step, peak memory and, where there are any, bytes stored and sent, as a PNG."""
    stored = any(run.disk_bytes or run.wire_bytes for run in runs)
    figure = Figure(figsize=(WIDTH, 1.5 + 0.55 * len(runs)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 + stored, sharey=True, width_ratios=[1.3, 1, 1] if stored else [1.3, 1])
    policy, reference = ([getattr(run, f"{name}_seconds") for run in runs] for name in ("policy", "reference"))
    _bars(
        panels[0],
        "Median step, seconds",
        {"policy": (policy, POLICY_COLOUR), "reference": (reference, REFERENCE_COLOUR)},
        [f"{one + two:.2f}" for one, two in zip(policy, reference, strict=True)],
    )
    memory = [run.peak_memory / 2**30 for run in runs]
    _bars(panels[1], "Peak memory, GiB", {"": (memory, "#E69F00")}, [f"{value:.2f}" for value in memory])
    if stored:
        disk, wire = ([(getattr(run, f"{name}_bytes") or 0) / 1e6 for run in runs] for name in ("disk", "wire"))
        parts = {"on disk": (disk, "#009E73"), "on the wire": (wire, "#CC79A7")}
        totals = [one + two for one, two in zip(disk, wire, strict=True)]
        _bars(
            panels[2],
            "Stored and sent, MB",
            {label: part for label, part in parts.items() if any(part[0])},
            [f"{total:.2g}" if total else "none" for total in totals],
        )
    panels[0].set_yticks(range(len(runs)), ["\n".join(textwrap.wrap(run.contender.label, 18)) for run in runs])
    panels[0].invert_yaxis()
    figure.savefig(path)


def _bars(axes: Any, title: str, parts: dict[str, tuple[list[float], str]], totals: list[str]) -> None:
    """Horizontal bars, one a run, of stacked parts, with the total beside each."""
    left = np.zeros(len(totals))
    for label, (values, colour) in parts.items():
        axes.barh(range(len(totals)), values, 0.62, left=left, color=colour, label=label or None)
        left += values
    for place, (end, text) in enumerate(zip(left, totals, strict=True)):
        axes.annotate(text, (end, place), (4, 0), textcoords="offset points", va="center", fontsize=9.5)
    axes.set_title(title, loc="left", fontweight="bold", fontsize=11)
    axes.set_xlim(0, max(left.max(), 1e-9) * 1.25)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    if any(parts):
        axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
