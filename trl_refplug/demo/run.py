"""The demo's training run: LoRA-DPO on the pairs of `data`, with the reference from any provider."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback, TrainerCallback

from trl_refplug import RefPlugDPOConfig, RefPlugDPOTrainer

from .data import load_pairs


PAIRS_PER_STEP = 2
SAMPLED_PROMPTS = 4
SAMPLE_TOKENS = 64


@dataclass(frozen=True)
class DemoSettings:
    """
    What `trl-refplug demo` was asked for.

    Args:
        model (`str`): Directory or hub id of a chat model.
        ref_provider (`str`): Name of the reference provider, or `auto`.
        ref_provider_kwargs (`str`, *optional*): Its options as JSON text.
        steps (`int`): Optimiser steps.
        seed (`int`): Seed of everything random.
    """

    model: str
    ref_provider: str = "auto"
    ref_provider_kwargs: str | None = None
    steps: int = 24
    seed: int = 0


@dataclass(frozen=True)
class Step:
    """One optimiser step: DPO loss, reward margin and accuracy of its pairs, seconds in all and for the reference."""

    step: int
    loss: float
    margin: float
    accuracy: float
    seconds: float
    reference_seconds: float


@dataclass(frozen=True)
class Sample:
    """The model's greedy answer to a held-out prompt, cut after `SAMPLE_TOKENS` tokens, before and after training."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class DemoResult:
    """
    What came of the run.

    Args:
        settings (`DemoSettings`): What was asked for.
        provider (`str`): The provider that answered; what `auto` came to.
        reference (`str`): The identity of the reference, for people.
        device (`str`): `cpu`, `cuda`, ...
        steps (`list[Step]`): All steps.
        heldout_loss (`float`): DPO loss on the held-out pairs after training; it is ln 2 before.
        heldout_margin (`float`): Reward margin on them; 0 before.
        heldout_accuracy (`float`): Share of them whose chosen answer has the higher reward.
        samples (`list[Sample]`): Answers before and after.
        peak_memory (`int`): Bytes: the largest resident set of the process, or what was allocated on the GPU.
        seconds (`float`): Wall time of all of it, model loading included.
    """

    settings: DemoSettings
    provider: str
    reference: str
    device: str
    steps: list[Step]
    heldout_loss: float
    heldout_margin: float
    heldout_accuracy: float
    samples: list[Sample]
    peak_memory: int
    seconds: float

    @property
    def step_seconds(self) -> float:
        """The median step."""
        return median(step.seconds for step in self.steps)

    @property
    def reference_share(self) -> float:
        """The part of all steps' time that the reference took."""
        return sum(step.reference_seconds for step in self.steps) / sum(step.seconds for step in self.steps)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return asdict(self) | {"step_seconds": self.step_seconds, "reference_share": self.reference_share}


def run(
    settings: DemoSettings, scratch: Path, on_phase: Callable[[str], None], on_step: Callable[[Step], None]
) -> DemoResult:
    """
    Train, evaluate and sample. The trained adapter is saved in `scratch / "adapter"`.

    Args:
        settings (`DemoSettings`): What to do.
        scratch (`Path`): An existing directory.
        on_phase (`Callable[[str], None]`): Told what begins.
        on_step (`Callable[[Step], None]`): Given every step as it ends.
    """
    _silence()
    started = time.perf_counter()
    on_phase("Loading the model")
    train_pairs, heldout_pairs = load_pairs()
    trainer = _trainer(settings, scratch, train_pairs, heldout_pairs)
    recorder = _Recorder(on_step)
    trainer.add_callback(recorder)
    trainer.remove_callback(PrinterCallback)

    prompts = [pair["prompt"] for pair in heldout_pairs[:SAMPLED_PROMPTS]]
    on_phase("Sampling before training")
    before = _answers(trainer, prompts)
    on_phase("Training")
    trainer.train()
    on_phase("Evaluating on held-out pairs")
    heldout = trainer.evaluate()
    on_phase("Sampling after training")
    after = _answers(trainer, prompts)
    for part in (trainer.model, trainer.processing_class):
        part.save_pretrained(scratch / "adapter")

    identity = trainer.ref_model.provider.identity()
    return DemoResult(
        settings=settings,
        provider=identity.provider,
        reference=str(identity),
        device=trainer.accelerator.device.type,
        steps=recorder.steps,
        heldout_loss=heldout["eval_loss"],
        heldout_margin=heldout["eval_rewards/margins"],
        heldout_accuracy=heldout["eval_rewards/accuracies"],
        samples=[Sample(prompt[-1]["content"], *texts) for prompt, *texts in zip(prompts, before, after, strict=True)],
        peak_memory=_peak_memory(),
        seconds=time.perf_counter() - started,
    )


def _trainer(settings: DemoSettings, scratch: Path, train: list[Any], heldout: list[Any]) -> Any:
    on_gpu = torch.accelerator.is_available()
    args = RefPlugDPOConfig(
        output_dir=str(scratch / "trainer"),
        ref_provider=settings.ref_provider,
        ref_provider_kwargs=settings.ref_provider_kwargs,
        max_steps=settings.steps,
        per_device_train_batch_size=PAIRS_PER_STEP,
        per_device_eval_batch_size=2 * PAIRS_PER_STEP,
        learning_rate=2e-4,
        max_length=256,
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
    return RefPlugDPOTrainer(
        model=settings.model,
        args=args,
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(heldout),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


class _Recorder(TrainerCallback):  # type: ignore[misc]
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


def _answers(trainer: Any, prompts: list[Any]) -> list[str]:
    tokenizer, model = trainer.processing_class, trainer.model
    texts = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt").to(
        model.device
    )
    training, threads = model.training, torch.get_num_threads()
    model.eval()
    # A token is too little work to share between cores: waiting for a busy one can make it ten times as long.
    torch.set_num_threads(1)
    with torch.no_grad():
        generated = model.generate(
            **inputs, max_new_tokens=SAMPLE_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
    torch.set_num_threads(threads)
    model.train(training)
    completions = generated[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(completions, skip_special_tokens=True)]


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kibibytes


def _silence() -> None:
    """The screen is for the progress bar. What trl-refplug itself warns of is still shown."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in ("trl", "accelerate", "peft", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(trl|transformers|accelerate|peft|torch|datasets)(\.|$)")
