"""How training runs are shown while they last. Imported late: rich is not needed for help and listings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


if TYPE_CHECKING:
    from rich.console import Console

    from trl_refplug.demo.job import Step


def step_progress(console: Console) -> Progress:
    """A bar of optimiser steps per task, and after it the task's field `shown`."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[shown]}"),
        console=console,
        refresh_per_second=4,
    )


def told(step: Step) -> str:
    """What is said of a step."""
    return f"loss {step.loss:.3f}  margin {step.margin:.2f}"
