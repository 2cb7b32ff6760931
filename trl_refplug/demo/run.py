"""The demo's training run: LoRA-DPO on the pairs of `data`, with the reference from any provider."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from trl_refplug.demo.data import load_pairs
from trl_refplug.demo.job import JobSettings, Step, StepRecorder, make_trainer, peak_memory, silence


SAMPLED_PROMPTS = 4
SAMPLE_TOKENS = 64


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
        settings (`JobSettings`): What was asked for.
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

    settings: JobSettings
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
    settings: JobSettings, scratch: Path, on_phase: Callable[[str], None], on_step: Callable[[Step], None]
) -> DemoResult:
    """
    Train, evaluate and sample. The trained adapter is saved in `scratch / "adapter"`.

    Args:
        settings (`JobSettings`): What to do.
        scratch (`Path`): An existing directory.
        on_phase (`Callable[[str], None]`): Told what begins.
        on_step (`Callable[[Step], None]`): Given every step as it ends.
    """
    silence()
    started = time.perf_counter()
    on_phase("Loading the model")
    train_pairs, heldout_pairs = load_pairs()
    recorder = StepRecorder(on_step)
    trainer = make_trainer(settings, scratch, train_pairs, heldout_pairs, recorder)

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
        peak_memory=peak_memory(),
        seconds=time.perf_counter() - started,
    )


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
