"""Trains the job in this process: LoRA-DPO on preference pairs, with the reference from any provider."""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

from trl_refplug import RefPlugDPOConfig, RefPlugDPOTrainer
from trl_refplug.compare.job import PAIRS_PER_STEP, Job, Run, Step
from trl_refplug.compare.provider_choice import ProviderChoice
from trl_refplug.plugins import plugin_manager
from trl_refplug.runtime.memory import peak_resident_set


REFERENCE = "reference.npz"
FIRST_BATCHES = 4  # the reference log-probs of these batches are kept for comparison


class StepRecorder(TrainerCallback):  # type: ignore[misc]
    """
    Collects the steps from TRL's logs.

    Args:
        on_step (`Callable[[Step], None]`): Is called with each step as it ends.
    """

    def __init__(self, on_step: Callable[[Step], None]) -> None:
        self.steps: list[Step] = []
        self._on_step = on_step
        self._began = self._seconds = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._seconds = time.perf_counter() - self._began

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "loss" not in logs:  # these are logs of an evaluation, or the summary at the end
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
    job: Job,
    choice: ProviderChoice,
    folder: Path,
    recorder: StepRecorder,
    train_pairs: list[Any],
    heldout_pairs: list[Any] | None = None,
) -> Any:
    """
    Make the job's trainer. It saves no checkpoints.

    Args:
        job (`Job`): What to train.
        choice (`ProviderChoice`): Where the reference comes from.
        folder (`Path`): An existing directory for the trainer's files.
        recorder (`StepRecorder`): Collects the steps.
        train_pairs, heldout_pairs (`list`): Pairs in TRL's preference format. Evaluation needs held-out pairs.
    """
    on_gpu = torch.accelerator.is_available()
    args = RefPlugDPOConfig(
        output_dir=str(folder / "trainer"),
        ref_provider=choice.name,
        ref_provider_kwargs=choice.options,
        max_steps=job.steps,
        per_device_train_batch_size=PAIRS_PER_STEP,
        per_device_eval_batch_size=2 * PAIRS_PER_STEP,
        learning_rate=2e-4,
        max_length=job.max_length,
        seed=job.seed,
        model_init_kwargs={"dtype": "float32"},
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        gradient_checkpointing=False,  # it saves memory at the cost of time, and this model is small
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = RefPlugDPOTrainer(
        model=job.model,
        args=args,
        train_dataset=Dataset.from_list(train_pairs),
        eval_dataset=Dataset.from_list(heldout_pairs) if heldout_pairs else None,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.add_callback(recorder)
    trainer.remove_callback(PrinterCallback)
    return trainer


def run_job(
    job: Job, choice: ProviderChoice, folder: Path, on_phase: Callable[[str], None], on_step: Callable[[Step], None]
) -> Run:
    """
    Train the job in this process, and save the record of the run and the first reference log-probs.

    Args:
        job (`Job`): What to train.
        choice (`ProviderChoice`): Where the reference comes from.
        folder (`Path`): An empty directory for the run's files.
        on_phase (`Callable[[str], None]`): Is called with the name of each phase as it begins.
        on_step (`Callable[[Step], None]`): Is called with each step as it ends.
    """
    silence()
    on_phase("loading")
    facts = job.facts()
    configured = choice
    if plugin_manager().registered(choice.name).capabilities.stored:
        # The default store may hold the rows already, from another run, and then this run would seem to cost nothing.
        configured = replace(choice, kwargs=json.dumps({"path": str(folder / "store"), **choice.options}))
    began = time.perf_counter()
    recorder = StepRecorder(on_step)
    trainer = make_trainer(job, configured, folder, recorder, job.pairs())
    seconds_before = time.perf_counter() - began
    answers = _FirstAnswers()
    trainer.ref_model.register_forward_hook(answers, with_kwargs=True)
    on_phase("training")
    trainer.train()

    answers.save(folder / REFERENCE)
    provider = trainer.ref_model.provider
    reference, path, counters = str(provider.identity()), provider.metadata().get("path"), provider.counters()
    provider.close()  # after this, the provider's files are complete and its temporary files are gone
    finished = Run(
        choice=choice,
        facts=facts,
        reference=reference,
        moving=provider.capabilities.moving,
        device=trainer.accelerator.device.type,
        steps=recorder.steps,
        seconds_before=seconds_before,
        peak_memory=peak_memory(),
        disk_bytes=_disk_bytes(path),
        wire_bytes=answers.wire_bytes(counters),
    )
    finished.save(folder)
    return finished


class _FirstAnswers:
    """A forward hook that sees every batch the trainer asks its reference for, and keeps the first answers."""

    def __init__(self) -> None:
        self._arrays: dict[str, Any] = {}
        self._tokens = 0

    def __call__(self, module: Any, args: Any, inputs: dict[str, Tensor], output: Any) -> None:
        self._tokens += int(inputs["attention_mask"].sum())
        count = len(self._arrays) // 2
        if count < FIRST_BATCHES:
            # These are copies, because the trainer may change the originals.
            self._arrays[f"labels_{count}"] = inputs["labels"].cpu().numpy().copy()
            self._arrays[f"log_probs_{count}"] = output.log_probs.cpu().numpy().copy()

    def save(self, path: Path) -> None:
        np.savez_compressed(path, **self._arrays)

    def wire_bytes(self, counters: dict[str, float]) -> int | None:
        """The bytes sent and received for all batches. `None` if the provider does not count what it sends."""
        per_token = counters.get("bytes_per_token")
        return None if per_token is None else round(per_token * self._tokens)


def _disk_bytes(path: str | None) -> int | None:
    if path is None or not Path(path).is_dir():
        return None
    return sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())


def peak_memory() -> int:
    """Peak bytes: the resident set of this process, or on a GPU what was allocated there."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return peak_resident_set()


def silence() -> None:
    """Leave the screen to the progress bar. Only the warnings of trl-refplug itself are still shown."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in ("trl", "accelerate", "peft", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(trl|transformers|accelerate|peft|torch|datasets)(\.|$)")
