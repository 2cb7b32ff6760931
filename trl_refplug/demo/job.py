"""The training job that the demo runs, and `trl-refplug compare` runs several times: LoRA-DPO on preference pairs."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback, TrainerCallback

from trl_refplug import RefPlugDPOConfig, RefPlugDPOTrainer
from trl_refplug.runtime.memory import peak_resident_set


PAIRS_PER_STEP = 2


@dataclass(frozen=True)
class JobSettings:
    """
    What there is to choose in the job.

    Args:
        model (`str`): Directory or hub id of a chat model.
        ref_provider (`str`): Name of the reference provider, or `auto`.
        ref_provider_kwargs (`dict` or `str`, *optional*): Its options, as a dictionary or as JSON text.
        steps (`int`): Optimiser steps, of `PAIRS_PER_STEP` pairs each.
        seed (`int`): Seed of everything random.
        max_length (`int`): Rows are cut to this many tokens.
    """

    model: str
    ref_provider: str = "auto"
    ref_provider_kwargs: dict[str, Any] | str | None = None
    steps: int = 24
    seed: int = 0
    max_length: int = 256


@dataclass(frozen=True)
class Step:
    """One optimiser step: DPO loss, reward margin and accuracy of its pairs, seconds in all and for the reference."""

    step: int
    loss: float
    margin: float
    accuracy: float
    seconds: float
    reference_seconds: float


class StepRecorder(TrainerCallback):  # type: ignore[misc]
    """Collects the steps from TRL's logs."""

    def __init__(self, on_step: Callable[[Step], None]) -> None:
        self.steps: list[Step] = []
        self._on_step = on_step
        self._began = self._seconds = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._seconds = time.perf_counter() - self._began

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "loss" not in logs:  # the summary at the end, or an evaluation
            return
        step = Step(
            step=state.global_step,
            loss=float(logs["loss"]),
            margin=float(logs["rewards/margins"]),
            accuracy=float(logs["rewards/accuracies"]),
            seconds=self._seconds,
            reference_seconds=float(logs["ref/time"]),
        )
        self.steps.append(step)
        self._on_step(step)


def make_trainer(
    settings: JobSettings, scratch: Path, train: list[Any], heldout: list[Any] | None, recorder: StepRecorder
) -> Any:
    """
    The job's trainer. Evaluation needs `heldout`; nothing is saved.

    Args:
        settings (`JobSettings`): What to do.
        scratch (`Path`): An existing directory.
        train, heldout (`list`): Pairs in TRL's preference format.
        recorder (`StepRecorder`): Collects the steps.
    """
    on_gpu = torch.accelerator.is_available()
    args = RefPlugDPOConfig(
        output_dir=str(scratch / "trainer"),
        ref_provider=settings.ref_provider,
        ref_provider_kwargs=settings.ref_provider_kwargs,
        max_steps=settings.steps,
        per_device_train_batch_size=PAIRS_PER_STEP,
        per_device_eval_batch_size=2 * PAIRS_PER_STEP,
        learning_rate=2e-4,
        max_length=settings.max_length,
        seed=settings.seed,
        model_init_kwargs={"dtype": "float32"},
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        gradient_checkpointing=False,  # it trades time for memory that a model this small does not need
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = RefPlugDPOTrainer(
        model=settings.model,
        args=args,
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(heldout) if heldout else None,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.add_callback(recorder)
    trainer.remove_callback(PrinterCallback)
    return trainer


def peak_memory() -> int:
    """Bytes: the largest resident set of this process, or on a GPU the most that was allocated there."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return peak_resident_set()


def silence() -> None:
    """Leave the screen to the progress bar. What trl-refplug itself warns of is still shown."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in ("trl", "accelerate", "peft", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(trl|transformers|accelerate|peft|torch|datasets)(\.|$)")
