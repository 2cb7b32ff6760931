"""One contender's run of the job, and the files it leaves behind: `reference.npz`, `run.json`, a provider's store."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from trl_refplug.compare.contenders import Contender
from trl_refplug.runtime.files import write_atomically


if TYPE_CHECKING:
    from torch import Tensor

    from trl_refplug.demo.job import Step


RESULT = "run.json"
REFERENCE = "reference.npz"
FIRST_BATCHES = 4  # whose reference log-probs are kept, to be compared
LAST_STEPS = 5  # a single step has two pairs: too few to tell where the curves ended


@dataclass(frozen=True)
class Job:
    """
    The training job that every contender runs.

    Args:
        model (`str`): Directory or hub id of a chat model.
        data (`str`, *optional*): JSON lines of preference pairs. `None` for those that ship with the package.
        steps (`int`): Optimiser steps.
        seed (`int`): Seed of everything random.
        max_length (`int`): Rows are cut to this many tokens.
    """

    model: str
    data: str | None
    steps: int
    seed: int
    max_length: int

    def pairs(self) -> list[dict[str, Any]]:
        """The pairs of all steps; fewer, if there are not as many. A provider that scores ahead scores no others."""
        from trl_refplug.demo.data import load_pairs
        from trl_refplug.demo.job import PAIRS_PER_STEP
        from trl_refplug.preference_files import read_pairs

        count = self.steps * PAIRS_PER_STEP
        return load_pairs()[0][:count] if self.data is None else read_pairs(Path(self.data), count)

    def facts(self) -> dict[str, Any]:
        """All that a finished run has to share with this job to count as a run of it."""
        from importlib.metadata import version

        import torch

        import trl_refplug

        return asdict(self) | {
            "files": [_stamp(path) for path in (self.model, self.data) if path is not None],
            "device": str(torch.accelerator.current_accelerator() or "cpu"),
            "threads": torch.get_num_threads(),
            "versions": {
                "trl-refplug": trl_refplug.__version__,
                "torch": str(torch.__version__),
                "trl": version("trl"),
            },
        }


def _stamp(name: str) -> list[list[Any]]:
    """Sizes and times of the file or of the directory's files, which tell whether they have changed."""
    path = Path(name)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]


@dataclass(frozen=True)
class Run:
    """
    What came of one contender's run.

    Args:
        contender (`Contender`): The provider and its options.
        facts (`dict`): Of the job, as in [`Job.facts`].
        reference (`str`): The identity of the reference at the end, for people.
        moving (`bool`): Whether this reference changes during training, so that others differ from it on purpose.
        device (`str`): `cpu`, `cuda`, ...
        steps (`list[Step]`): All steps.
        seconds_before (`float`): From loading the model to the first step: what is scored ahead is in it.
        peak_memory (`int`): Bytes: the largest resident set of the process, or what was allocated on the GPU.
        disk_bytes (`int`, *optional*): Size of the directory that the provider keeps its values in.
        wire_bytes (`int`, *optional*): Sent and received while training.
    """

    contender: Contender
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
        """What the trainer waited for the reference in the median step."""
        return median(step.reference_seconds for step in self.steps)

    @property
    def policy_seconds(self) -> float:
        """All else of the median step."""
        return median(step.seconds - step.reference_seconds for step in self.steps)

    def ended(self, name: str) -> float:
        """Mean of `loss` or `margin` over the last steps."""
        return fmean(getattr(step, name) for step in self.steps[-LAST_STEPS:])

    def save(self, folder: Path) -> None:
        """Write it where [`Run.load`] finds it, whole or not at all."""
        write_atomically(folder / RESULT, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Run | None:
        """The finished run in `folder`, if there is one."""
        from trl_refplug.demo.job import Step

        try:
            values = json.loads((folder / RESULT).read_text(encoding="utf-8"))
            contender = Contender(**values.pop("contender"))
            steps = [Step(**step) for step in values.pop("steps")]
            return cls(contender=contender, steps=steps, **values)
        except (OSError, ValueError, KeyError, TypeError):  # none, or of another release
            return None


def run(
    job: Job, contender: Contender, folder: Path, on_phase: Callable[[str], None], on_step: Callable[[Step], None]
) -> Run:
    """
    Run the job in this process.

    Args:
        job (`Job`): What to do.
        contender (`Contender`): Where the reference comes from.
        folder (`Path`): An empty directory for the run's files.
        on_phase (`Callable[[str], None]`): Told what begins.
        on_step (`Callable[[Step], None]`): Given every step as it ends.
    """
    from trl_refplug.demo.job import JobSettings, StepRecorder, make_trainer, peak_memory, silence

    silence()
    on_phase("loading")
    facts = job.facts()
    options = contender.options
    if contender.name == "cached":  # a store that others filled would cost nothing, and show nothing
        options.setdefault("path", str(folder / "store"))
    settings = JobSettings(job.model, contender.name, options, job.steps, job.seed, job.max_length)
    began = time.perf_counter()
    recorder = StepRecorder(on_step)
    trainer = make_trainer(settings, folder, job.pairs(), None, recorder)
    seconds_before = time.perf_counter() - began
    watched = _Watched()
    trainer.ref_model.register_forward_hook(watched, with_kwargs=True)
    on_phase("training")
    trainer.train()

    watched.save(folder / REFERENCE)
    provider = trainer.ref_model.provider
    reference, path, counters = str(provider.identity()), provider.metadata().get("path"), provider.counters()
    provider.close()  # what it keeps on disk is complete then, and nothing else is there
    finished = Run(
        contender=contender,
        facts=facts,
        reference=reference,
        moving=provider.capabilities.moving,
        device=trainer.accelerator.device.type,
        steps=recorder.steps,
        seconds_before=seconds_before,
        peak_memory=peak_memory(),
        disk_bytes=_disk_bytes(path),
        wire_bytes=watched.wire_bytes(counters),
    )
    finished.save(folder)
    return finished


class _Watched:
    """Sees every batch that the trainer asks its reference for, and keeps the first answers."""

    def __init__(self) -> None:
        self._arrays: dict[str, Any] = {}
        self._tokens = 0

    def __call__(self, module: Any, args: Any, inputs: dict[str, Tensor], output: Any) -> None:
        self._tokens += int(inputs["attention_mask"].sum())
        count = len(self._arrays) // 2
        if count < FIRST_BATCHES:
            self._arrays[f"labels_{count}"] = inputs["labels"].cpu().numpy().copy()
            self._arrays[f"log_probs_{count}"] = output.log_probs.cpu().numpy().copy()  # the trainer may change it

    def save(self, path: Path) -> None:
        import numpy as np

        np.savez_compressed(path, **self._arrays)

    def wire_bytes(self, counters: dict[str, float]) -> int | None:
        """From the counter of providers that have something sent."""
        per_token = counters.get("bytes_per_token")
        return None if per_token is None else round(per_token * self._tokens)


def _disk_bytes(path: str | None) -> int | None:
    if path is None or not Path(path).is_dir():
        return None
    return sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())
