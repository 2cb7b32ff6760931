"""What the demo shows at its end and leaves behind."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from trl_refplug.demo.run import SAMPLE_TOKENS, DemoResult


LAST_STEPS = 5  # a single step has two pairs: too few to tell where the curves ended


def summary(result: DemoResult) -> RenderableType:
    """The closing table and one answer before and after."""
    first, last = result.steps[0], result.steps[-LAST_STEPS:]
    table = Table(title=f"DPO with the reference from provider {result.provider!r}", title_justify="left", box=None)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(justify="right")
    table.add_column(style="dim")
    table.add_row(
        "loss", _change(first.loss, [step.loss for step in last]), f"first step → mean of the last {len(last)}"
    )
    table.add_row("reward margin", _change(first.margin, [step.margin for step in last]), "the same")
    table.add_row("held-out accuracy", f"{result.heldout_accuracy:.0%}", f"margin {result.heldout_margin:.3f}")
    table.add_row("step time", f"{result.step_seconds:.2f} s", f"median, on {result.device}")
    table.add_row("reference's share", f"{result.reference_share:.0%}", "of the time of all steps")
    place = "resident" if result.device == "cpu" else f"allocated on {result.device}"
    table.add_row("peak memory", f"{result.peak_memory / 2**30:.2f} GiB", place)

    sample, count = result.samples[0], len(result.samples)
    before = fmean(len(sample.before.split()) for sample in result.samples)
    after = fmean(len(sample.after.split()) for sample in result.samples)
    answers = Text()
    answers.append("A held-out prompt: ", "bold").append(f"{sample.prompt}\n")
    answers.append("Before: ", "bold").append(f"{_one_line(sample.before)}\n")
    answers.append("After:  ", "bold").append(f"{_one_line(sample.after)}\n")
    answers.append(
        f"Words in {count} such answers of at most {SAMPLE_TOKENS} tokens: {before:.0f} → {after:.0f} on average",
        "dim",
    )
    return Group(table, Text(), answers)


def _change(first: float, last: list[float]) -> str:
    return f"{first:.3f} → {fmean(last):.3f}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def write_json(result: DemoResult, path: Path) -> None:
    """All figures, and every step."""
    path.write_text(json.dumps(result.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def draw(result: DemoResult, path: Path) -> None:
    """The curves of loss and reward margin as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    numbers = [step.step for step in result.steps]
    panels = [
        ("DPO loss", [step.loss for step in result.steps], math.log(2), "ln 2", "#2a6fbb", result.heldout_loss),
        ("Reward margin", [step.margin for step in result.steps], 0.0, "0", "#c2571a", result.heldout_margin),
    ]
    figure = Figure(figsize=(9, 3.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, values, start, start_name, colour, heldout) in zip(figure.subplots(1, 2), panels, strict=True):
        axes.axhline(start, color="0.6", linewidth=1, linestyle="--", label=f"policy = reference ({start_name})")
        axes.plot(numbers, values, color=colour, linewidth=2, label="training pairs")
        axes.plot(numbers[-1], heldout, "D", color="black", markersize=6, label="held-out pairs, at the end", zorder=3)
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set_xlabel("optimiser step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)
