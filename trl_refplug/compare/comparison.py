"""How far the runs agree and what they cost: a table in Markdown and on the screen, and all figures as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from trl_refplug.compare.job import LAST_STEPS, Run, first_and_last
from trl_refplug.compare.training import FIRST_BATCHES, REFERENCE


NOTHING = "-"


@dataclass(frozen=True)
class Agreement:
    """
    How far a run differs from the first one.

    Args:
        log_probs (`float`, *optional*): Largest difference of the reference log-prob of any scored token in the first
            batches, in nats. `None` if the two runs asked about different rows.
        loss (`float`): Largest difference of the loss of any step.
    """

    log_probs: float | None
    loss: float


def compare_runs(first: Run, first_folder: Path, other: Run, other_folder: Path) -> Agreement:
    """Compare two finished runs of the same job."""
    losses = zip(first.steps, other.steps, strict=True)
    return Agreement(
        log_probs=_log_prob_difference(first_folder / REFERENCE, other_folder / REFERENCE),
        loss=max(abs(one.loss - two.loss) for one, two in losses),
    )


def _log_prob_difference(first: Path, other: Path) -> float | None:
    largest = 0.0
    with np.load(first) as one, np.load(other) as two:
        for number in range(len(one.files) // 2):
            labels, log_probs = f"labels_{number}", f"log_probs_{number}"
            if not np.array_equal(one[labels], two[labels]):
                return None
            largest = max(largest, float(np.abs(one[log_probs] - two[log_probs]).max()))
    return largest


def _rows(runs: list[Run], agreements: list[Agreement]) -> list[tuple[str, list[str]]]:
    """
    The rows of the table. Each is a title and one cell for each run; a row that has no values is left out.

    `agreements` are those of the second and all further runs.
    """
    table = [
        ("loss", [first_and_last(run.steps, "loss") for run in runs]),
        ("reward margin", [first_and_last(run.steps, "margin") for run in runs]),
        ("step, median", [f"{run.policy_seconds + run.reference_seconds:.2f} s" for run in runs]),
        ("of it the reference", [_reference_share(run) for run in runs]),
        ("before the first step", [f"{run.seconds_before:.1f} s" for run in runs]),
        ("peak memory", [f"{run.peak_memory / 2**30:.2f} GiB" for run in runs]),
        ("on disk", [format_bytes(run.disk_bytes) for run in runs]),
        ("on the wire", [format_bytes(run.wire_bytes) for run in runs]),
        ("reference differs by", [NOTHING, *(_difference(one.log_probs, " nats") for one in agreements)]),
        ("loss differs by", [NOTHING, *(_difference(one.loss) for one in agreements)]),
    ]
    return [(title, cells) for title, cells in table if any(cell != NOTHING for cell in cells)]


def _reference_share(run: Run) -> str:
    whole = run.policy_seconds + run.reference_seconds
    return f"{run.reference_seconds:.2f} s ({run.reference_seconds / whole:.0%})"


def _difference(largest: float | None, unit: str = "") -> str:
    return "other rows" if largest is None else "nothing" if largest == 0 else f"{largest:.1e}{unit}"


def format_bytes(size: int | None) -> str:
    """A size in MB or kB, as text."""
    if size is None:
        return NOTHING
    return f"{size / 1e6:.1f} MB" if size >= 100_000 else f"{size / 1e3:.1f} kB"


def notes(runs: list[Run]) -> list[str]:
    """What a reader has to know in order to read the table right."""
    job, run = runs[0].facts, runs[0]
    threads, steps = job["threads"], job["steps"]
    place = job["device"] if run.device != "cpu" else f"{threads} CPU thread{'s' if threads > 1 else ''}"
    data = "the pairs that ship with the package" if job["data"] is None else Path(job["data"]).name
    lines = [
        f"LoRA-DPO of {Path(job['model']).name} on {data}: {steps} steps of two pairs, seed {job['seed']}, on "
        f"{place}, each run in a process of its own. Loss and margin: first step → mean of the last "
        f"{min(LAST_STEPS, steps)}. Before the first step the model is loaded, and a provider that scores ahead "
        "does so."
    ]
    if len(runs) > 1:
        lines.append(
            f"Differences are the largest from {run.choice.label}: of any token's reference log-prob in the first "
            f"{min(FIRST_BATCHES, steps)} batches, and of any step's loss."
        )
    moving = [run.choice.label for run in runs if run.moving]
    if moving:
        lines.append(f"{', '.join(moving)} follows the policy, so its losses are meant to differ.")
    return lines


def as_markdown(runs: list[Run], agreements: list[Agreement]) -> str:
    """The notes and the table, for `compare.md`."""
    lines = [
        *notes(runs),
        "",
        f"| | {' | '.join(run.choice.label for run in runs)} |",
        "|---|" + "---|" * len(runs),
    ]
    lines += [f"| {title} | {' | '.join(cells)} |" for title, cells in _rows(runs, agreements)]
    return "\n".join(lines) + "\n"


def as_table(runs: list[Run], agreements: list[Agreement]) -> Table:
    """The same table, for the screen."""
    table = Table(box=None)
    table.add_column(style="bold")
    for run in runs:
        table.add_column(run.choice.label, justify="right", overflow="fold")
    for title, cells in _rows(runs, agreements):
        table.add_row(title, *cells)
    return table


def as_json(runs: list[Run], agreements: list[Agreement]) -> str:
    """Every figure of every run, for `results.json`."""
    values: list[dict[str, Any]] = [run.to_dict() for run in runs]
    for value, one in zip(values[1:], agreements, strict=True):
        value["agreement"] = asdict(one)
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"
