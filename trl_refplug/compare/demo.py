"""The demo: trains the job once, evaluates on held-out pairs, and samples answers before and after training."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from trl_refplug.compare.job import LAST_STEPS, Job, Step, first_and_last
from trl_refplug.compare.pairs import load_pairs
from trl_refplug.compare.provider_choice import ProviderChoice
from trl_refplug.compare.training import StepRecorder, make_trainer, peak_memory, silence


SAMPLED_PROMPTS = 4
SAMPLE_TOKENS = 64


@dataclass(frozen=True)
class Sample:
    """The model's greedy answers of at most `SAMPLE_TOKENS` tokens to a held-out prompt, before and after training."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class DemoResult:
    """
    The result of the demo's run.

    Args:
        settings (`dict`): What the run was asked to do.
        provider (`str`): The provider that answered. For `auto`, this is the one that it selected.
        reference (`str`): The identity of the reference, as text for people.
        device (`str`): `cpu`, `cuda`, ...
        steps (`list[Step]`): All steps.
        heldout_loss (`float`): DPO loss on the held-out pairs after training. It is ln 2 before training.
        heldout_margin (`float`): Reward margin on these pairs. It is 0 before training.
        heldout_accuracy (`float`): Share of these pairs whose chosen answer has the higher reward.
        samples (`list[Sample]`): Answers before and after training.
        peak_memory (`int`): Peak bytes: the resident set of the process, or on a GPU what was allocated there.
        seconds (`float`): Wall time of the whole run, including loading the model.
    """

    settings: dict[str, Any]
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
        """Median time of a step."""
        return median(step.seconds for step in self.steps)

    @property
    def reference_share(self) -> float:
        """The part of the time of all steps that the trainer waited for the reference."""
        return sum(step.reference_seconds for step in self.steps) / sum(step.seconds for step in self.steps)

    def to_json(self) -> str:
        """Every figure and every step, for `results.json`."""
        values = asdict(self) | {"step_seconds": self.step_seconds, "reference_share": self.reference_share}
        return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def run_demo(
    job: Job, choice: ProviderChoice, folder: Path, on_phase: Callable[[str], None], on_step: Callable[[Step], None]
) -> DemoResult:
    """
    Train, evaluate and sample. The trained adapter is saved in `folder / "adapter"`.

    Args:
        job (`Job`): What to train. It trains on the pairs that ship with the package.
        choice (`ProviderChoice`): Where the reference comes from.
        folder (`Path`): An existing directory for the run's files.
        on_phase (`Callable[[str], None]`): Is called with the name of each phase as it begins.
        on_step (`Callable[[Step], None]`): Is called with each step as it ends.
    """
    silence()
    started = time.perf_counter()
    on_phase("Loading the model")
    train_pairs, heldout_pairs = load_pairs()
    recorder = StepRecorder(on_step)
    trainer = make_trainer(job, choice, folder, recorder, train_pairs, heldout_pairs)

    prompts = [pair["prompt"] for pair in heldout_pairs[:SAMPLED_PROMPTS]]
    on_phase("Sampling before training")
    before = _generate_answers(trainer, prompts)
    on_phase("Training")
    trainer.train()
    on_phase("Evaluating on held-out pairs")
    heldout = trainer.evaluate()
    on_phase("Sampling after training")
    after = _generate_answers(trainer, prompts)
    for part in (trainer.model, trainer.processing_class):
        part.save_pretrained(folder / "adapter")

    identity = trainer.ref_model.provider.identity()
    return DemoResult(
        settings={
            "model": job.model,
            "ref_provider": choice.name,
            "ref_provider_kwargs": choice.kwargs,
            "steps": job.steps,
            "seed": job.seed,
            "max_length": job.max_length,
        },
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


def _generate_answers(trainer: Any, prompts: list[Any]) -> list[str]:
    tokenizer, model = trainer.processing_class, trainer.model
    texts = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt").to(
        model.device
    )
    training, threads = model.training, torch.get_num_threads()
    model.eval()
    # One token is too little work to be shared between cores: waiting for a busy core can make it ten times as slow.
    torch.set_num_threads(1)
    with torch.no_grad():
        generated = model.generate(
            **inputs, max_new_tokens=SAMPLE_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
    torch.set_num_threads(threads)
    model.train(training)
    completions = generated[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(completions, skip_special_tokens=True)]


def summary(result: DemoResult) -> RenderableType:
    """The table at the end of the demo, and one answer before and after training."""
    table = Table(title=f"DPO with the reference from provider {result.provider!r}", title_justify="left", box=None)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(justify="right")
    table.add_column(style="dim")
    last = min(LAST_STEPS, len(result.steps))
    table.add_row("loss", first_and_last(result.steps, "loss"), f"first step → mean of the last {last}")
    table.add_row("reward margin", first_and_last(result.steps, "margin"), "the same")
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
    answers.append("Before: ", "bold").append(f"{' '.join(sample.before.split())}\n")
    answers.append("After:  ", "bold").append(f"{' '.join(sample.after.split())}\n")
    answers.append(
        f"Words in {count} such answers of at most {SAMPLE_TOKENS} tokens: {before:.0f} → {after:.0f} on average",
        "dim",
    )
    return Group(table, Text(), answers)
