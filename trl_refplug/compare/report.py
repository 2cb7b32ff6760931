"""What the runs cost and how far they agree: one table, as Markdown and on the screen, and all figures as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_refplug.compare.run import FIRST_BATCHES, LAST_STEPS, REFERENCE, Run


if TYPE_CHECKING:
    from rich.table import Table

NOTHING = "-"


@dataclass(frozen=True)
class Agreement:
    """
    How far a run is from the first one.

    Args:
        log_probs (`float`, *optional*): Largest difference of a scored token's reference log-prob, in nats, over the
            first batches. `None` where the runs were not asked about the same rows.
        loss (`float`): Largest difference of a step's loss.
    """

    log_probs: float | None
    loss: float


def agreement(first: Run, first_folder: Path, other: Run, other_folder: Path) -> Agreement:
    """Compare two finished runs of one job."""
    losses = zip(first.steps, other.steps, strict=True)
    return Agreement(
        log_probs=_log_prob_difference(first_folder / REFERENCE, other_folder / REFERENCE),
        loss=max(abs(one.loss - two.loss) for one, two in losses),
    )


def _log_prob_difference(first: Path, other: Path) -> float | None:
    import numpy as np

    largest = 0.0
    with np.load(first) as one, np.load(other) as two:
        for number in range(len(one.files) // 2):
            labels, log_probs = f"labels_{number}", f"log_probs_{number}"
            if not np.array_equal(one[labels], two[labels]):
                return None
            largest = max(largest, float(np.abs(one[log_probs] - two[log_probs]).max()))
    return largest


Rows = list[tuple[str, list[str]]]


def rows(runs: list[Run], agreements: list[Agreement]) -> Rows:
    """
    The table: one row a figure, one cell a run; no row that would be empty. `agreements` are those of the second and
    all further runs.
    """
    table = [
        ("loss", [_change(run, "loss") for run in runs]),
        ("reward margin", [_change(run, "margin") for run in runs]),
        ("step, median", [f"{run.policy_seconds + run.reference_seconds:.2f} s" for run in runs]),
        ("of it the reference", [_share(run) for run in runs]),
        ("before the first step", [f"{run.seconds_before:.1f} s" for run in runs]),
        ("peak memory", [f"{run.peak_memory / 2**30:.2f} GiB" for run in runs]),
        ("on disk", [shown_bytes(run.disk_bytes) for run in runs]),
        ("on the wire", [shown_bytes(run.wire_bytes) for run in runs]),
        ("reference differs by", [NOTHING, *(_difference(one.log_probs, " nats") for one in agreements)]),
        ("loss differs by", [NOTHING, *(_difference(one.loss) for one in agreements)]),
    ]
    return [(title, cells) for title, cells in table if any(cell != NOTHING for cell in cells)]


def _change(run: Run, name: str) -> str:
    return f"{getattr(run.steps[0], name):.3f} → {run.ended(name):.3f}"


def _share(run: Run) -> str:
    whole = run.policy_seconds + run.reference_seconds
    return f"{run.reference_seconds:.2f} s ({run.reference_seconds / whole:.0%})"


def _difference(largest: float | None, unit: str = "") -> str:
    return "other rows" if largest is None else "nothing" if largest == 0 else f"{largest:.1e}{unit}"


def shown_bytes(size: int | None) -> str:
    """In MB or kB."""
    if size is None:
        return NOTHING
    return f"{size / 1e6:.1f} MB" if size >= 100_000 else f"{size / 1e3:.1f} kB"


def notes(runs: list[Run]) -> list[str]:
    """What a reader has to know to read the table right."""
    job, run = runs[0].facts, runs[0]
    threads, steps = job["threads"], job["steps"]
    place = job["device"] if run.device != "cpu" else f"{threads} CPU thread{'s' if threads > 1 else ''}"
    data = "the pairs that ship with the package" if job["data"] is None else Path(job["data"]).name
    told = [
        f"LoRA-DPO of {Path(job['model']).name} on {data}: {steps} steps of two pairs, seed {job['seed']}, on "
        f"{place}, each run in a process of its own. Loss and margin: first step → mean of the last "
        f"{min(LAST_STEPS, steps)}. Before the first step the model is loaded, and what can be is scored."
    ]
    if len(runs) > 1:
        told.append(
            f"Differences are the largest from {run.contender.label}: of any token's reference log-prob in the first "
            f"{min(FIRST_BATCHES, steps)} batches, and of any step's loss."
        )
    moving = [run.contender.label for run in runs if run.moving]
    if moving:
        told.append(f"{', '.join(moving)} follows the policy, so its losses differ on purpose.")
    return told


def as_markdown(runs: list[Run], agreements: list[Agreement]) -> str:
    """Notes and table."""
    lines = [
        *notes(runs),
        "",
        f"| | {' | '.join(run.contender.label for run in runs)} |",
        "|---|" + "---|" * len(runs),
    ]
    lines += [f"| {title} | {' | '.join(cells)} |" for title, cells in rows(runs, agreements)]
    return "\n".join(lines) + "\n"


def as_table(runs: list[Run], agreements: list[Agreement]) -> Table:
    """The same for the screen."""
    from rich.table import Table

    table = Table(box=None)
    table.add_column(style="bold")
    for run in runs:
        table.add_column(run.contender.label, justify="right", overflow="fold")
    for title, cells in rows(runs, agreements):
        table.add_row(title.replace("`", ""), *cells)
    return table


def as_json(runs: list[Run], agreements: list[Agreement]) -> str:
    """Every figure of every run."""
    values: list[dict[str, Any]] = [asdict(run) for run in runs]
    for value, one in zip(values[1:], agreements, strict=True):
        value["agreement"] = asdict(one)
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"
