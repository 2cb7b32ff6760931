"""The job that is trained, and the record that a run of it leaves behind in `run.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median
from typing import Any

import trl_refplug
from trl_refplug.compare.pairs import load_pairs
from trl_refplug.compare.provider_choice import ProviderChoice
from trl_refplug.data_files import read_pairs


PAIRS_PER_STEP = 2
LAST_STEPS = 5  # one step has only two pairs, too few to tell where a curve ended
RESULT = "run.json"


@dataclass(frozen=True)
class Job:
    """
    A LoRA-DPO training job. It does not say where the reference comes from.

    Args:
        model (`str`): Directory or hub id of a chat model.
        data (`str`, *optional*): JSON lines of preference pairs. `None` stands for the pairs that ship with the
            package.
        steps (`int`): Number of optimizer steps, of `PAIRS_PER_STEP` pairs each.
        seed (`int`): Seed of all random numbers.
        max_length (`int`): Rows are cut to this many tokens.
    """

    model: str
    data: str | None
    steps: int
    seed: int
    max_length: int = 256

    def pairs(self) -> list[dict[str, Any]]:
        """
        The pairs that the steps need, or all pairs if there are fewer.

        A provider that scores ahead scores all pairs it is given, so it is not given more than the steps need.
        """
        count = self.steps * PAIRS_PER_STEP
        return load_pairs()[0][:count] if self.data is None else read_pairs(Path(self.data), count)

    def facts(self) -> dict[str, Any]:
        """Everything that decides what a run does. A finished run counts for this job only if these are the same."""
        import torch

        return asdict(self) | {
            "files": [_sizes_and_times(path) for path in (self.model, self.data) if path is not None],
            "device": str(torch.accelerator.current_accelerator() or "cpu"),
            "threads": torch.get_num_threads(),
            "versions": {
                "trl-refplug": trl_refplug.__version__,
                "torch": str(torch.__version__),
                "trl": version("trl"),
            },
        }


def _sizes_and_times(name: str) -> list[list[Any]]:
    """Size and time of change of a file, or of each file in a directory. They show whether a file has changed."""
    path = Path(name)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]


@dataclass(frozen=True)
class Step:
    """
    One optimizer step: the DPO loss, reward margin and accuracy of its pairs, and the time it took.

    Args:
        seconds (`float`): Time of the whole step.
        reference_seconds (`float`): The part of it that the trainer waited for the reference.
    """

    step: int
    loss: float
    margin: float
    accuracy: float
    seconds: float
    reference_seconds: float

    def __str__(self) -> str:
        return f"loss {self.loss:.3f}  margin {self.margin:.2f}"


def first_and_last(steps: list[Step], name: str) -> str:
    """How a figure of the steps changed, as text: its first value, and its mean over the last steps."""
    first, last = getattr(steps[0], name), fmean(getattr(step, name) for step in steps[-LAST_STEPS:])
    return f"{first:.3f} → {last:.3f}"


@dataclass(frozen=True)
class Run:
    """
    The record of a finished run of a job with one provider.

    Args:
        choice (`ProviderChoice`): The provider and its options.
        facts (`dict`): The facts of the job, as [`Job.facts`] gives them.
        reference (`str`): The identity of the reference at the end, as text for people.
        moving (`bool`): Whether this reference changes during training. If so, its losses are meant to differ.
        device (`str`): `cpu`, `cuda`, ...
        steps (`list[Step]`): All steps.
        seconds_before (`float`): Time from loading the model to the first step. Scoring ahead is part of it.
        peak_memory (`int`): Peak bytes: the resident set of the process, or on a GPU what was allocated there.
        disk_bytes (`int`, *optional*): Size of the directory in which the provider keeps its values.
        wire_bytes (`int`, *optional*): Bytes that the provider sent and received during training.
    """

    choice: ProviderChoice
    facts: dict[str, Any]
    reference: str
    moving: bool
    device: str
    steps: list[Step]
    seconds_before: float
    peak_memory: int
    disk_bytes: int | None
    wire_bytes: int | None

    @property
    def reference_seconds(self) -> float:
        """Median over the steps of the time that the trainer waited for the reference."""
        return median(step.reference_seconds for step in self.steps)

    @property
    def policy_seconds(self) -> float:
        """Median over the steps of the time that everything else took."""
        return median(step.seconds - step.reference_seconds for step in self.steps)

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON values."""
        values = asdict(self)
        return {"contender": values.pop("choice"), **values}

    def save(self, folder: Path) -> None:
        """Write the record where [`Run.load`] finds it. The file appears whole or not at all."""
        unfinished = folder / f"{RESULT}.unfinished"
        unfinished.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        unfinished.replace(folder / RESULT)

    @classmethod
    def load(cls, folder: Path) -> Run | None:
        """Read the record in `folder`. Returns `None` if there is none that this release can read."""
        try:
            values = json.loads((folder / RESULT).read_text(encoding="utf-8"))
            choice = ProviderChoice(**values.pop("contender"))
            steps = [Step(**step) for step in values.pop("steps")]
            return cls(choice=choice, steps=steps, **values)
        except (OSError, ValueError, KeyError, TypeError):
            return None
