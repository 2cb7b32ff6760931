"""
Runs whose reference is known: what came of each, right, refused, or neither.

A [`Case`] makes a policy, declares a reference, and may do harm while training is on its way. [`outcome`] trains it
and compares every value that training was given with the [`Truth`], which was taken before the trainer was built.
"""

from __future__ import annotations

import copy
import re
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from trl_refplug import RefPlugError

from .. import tiny
from .oracle import Truth
from .runs import DATA, ONLINE, config, trainer_class


RIGHT, REFUSED = "right", "refused"
WRONG, RAW = "wrong", "raw error"
BY_TRL = "refused by TRL"  # in words of its own, before we are asked
BOTH = (RIGHT, REFUSED)
# Largest difference of a token, and of their mean, in nats. Two right answers differ by rounding.
FLOAT32, BFLOAT16 = (1e-3, 1e-3), (1.0, 5e-2)
DRIFT = 1e-2  # in bfloat16, how far an answer may be from an earlier one to the same rows
BUILT, END = "when it is built", "at the end"
_ADVICE = re.compile(
    r"\b(use|set|pass|remove|freeze|load|leave|give|name|save|keep|make|say|start|train|merge|serve|copy|choose|put"
    r"|resume|delete|install|declare|call|move|add|unmerge|activate|want|expected|instead)\b",
    re.IGNORECASE,
)
Batch = tuple[Tensor, Tensor, Tensor]  # ids, mask, labels


@dataclass
class Setting:
    """
    What a trainer is given, and what its reference has to answer.

    Args:
        policy: A model, or the path of one.
        truth ([`Truth`]): Of the declared reference, taken now.
        ref_model: Passed to the trainer, as are `peft_config` and `reference`.
        options (`dict`): Of the provider, beside the case's.
        harm (`Callable`, *optional*): In place of the case's.
    """

    policy: Any
    truth: Truth
    ref_model: Any = None
    peft_config: Any = None
    reference: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    harm: Callable[[Any], object] | None = None
    callbacks: Sequence[TrainerCallback] = ()


@dataclass(frozen=True, repr=False)
class Case:
    """
    One row of the matrix.

    Args:
        name (`str`): What is special about it.
        make (`Callable`): From a directory to a [`Setting`].
        provider, options: The flags that select the reference.
        kind (`str`): The trainer.
        allowed: What may come of it.
        harm (`Callable`, *optional*): Called with the trainer at the time `when`.
        when: `"constructed"`, `"begin"` (of training) or the steps at whose end it is.
        by (`int`): The last step at which a refusal is in time.
        precision (`str`): `"float32"`, `"bf16"` for a model in bfloat16, `"autocast"`.
        args (`dict`): More of the trainer's arguments.
        trainer: The class, if it is not the package's own for `kind`.
    """

    name: str
    make: Callable[[Path], Setting]
    provider: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)
    kind: str = "dpo"
    allowed: tuple[str, ...] = BOTH
    harm: Callable[[Any], object] | None = None
    when: str | tuple[int, ...] = (1,)
    by: int = 0
    precision: str = "float32"
    args: dict[str, Any] = field(default_factory=dict)
    trainer: Any = None

    @property
    def id(self) -> str:
        parts = [self.name, self.kind, self.provider]
        parts += [f"{key}={Path(str(value)).name}" for key, value in self.options.items()]
        if self.harm is not None:
            parts.append(self.when if isinstance(self.when, str) else "step" + ",".join(map(str, self.when)))
        if self.precision != "float32":
            parts.append(self.precision)
        return "-".join(parts)

    def __repr__(self) -> str:
        return self.id


@dataclass(frozen=True)
class Outcome:
    """
    Args:
        what (`str`): One of the four.
        detail (`str`): The error's first words, or where the values were apart.
        step (`int`): The optimizer step at which it was refused.
        nats (`float`): The largest difference of a token.
    """

    what: str
    detail: str = ""
    step: int = 0
    nats: float = 0.0

    def __str__(self) -> str:
        apart = f" by {self.nats:.3g} nats" if self.what == WRONG else ""
        return f"{self.what}{apart} {self.detail}".strip()


class Harm(TrainerCallback):
    """Calls `harm` at the end of `steps`, or as training begins."""

    def __init__(self, trainer: Any, harm: Callable[[Any], object], when: str | tuple[int, ...]) -> None:
        self.trainer, self.harm, self.when = trainer, harm, when

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.when == "begin":
            self.harm(self.trainer)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not isinstance(self.when, str) and state.global_step in self.when:
            self.harm(self.trainer)


class Answers:
    """Everything that training is told by its reference."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.given: list[tuple[str, Batch, Tensor]] = []
        trainer.ref_model.register_forward_hook(self._keep, with_kwargs=True)

    def _keep(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        batch = kwargs["input_ids"], kwargs["attention_mask"], kwargs["labels"]
        where = f"in step {self.trainer.state.global_step + 1}"
        self.given.append((where, tuple(t.clone() for t in batch), output.log_probs.clone()))

    def ask(self, where: str, batch: Batch) -> None:
        before = len(self.given)
        ids, mask, labels = (tensor.clone() for tensor in batch)
        with torch.no_grad():
            output = self.trainer.ref_model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
        self.given[before:] = [(where, batch, output.log_probs.clone())]


def outcome(case: Case, directory: Path) -> Outcome:
    """Train as `case` says, for some steps with checkpoints, and say what came of it."""
    setting = case.make(directory)
    trainer: Any = None
    answers: Answers | None = None
    try:
        trainer = build(case, setting, directory)
        answers = Answers(trainer)
        harm = setting.harm or case.harm
        if harm is not None and case.when == "constructed":
            harm(trainer)
        elif harm is not None:
            trainer.add_callback(Harm(trainer, harm, case.when))
        rows = text_rows(trainer, case.kind)
        answers.ask(BUILT, rows)
        trainer.train()
        answers.ask(END, rows)
    except RefPlugError as error:
        step = 0 if trainer is None else trainer.state.global_step
        if answers is not None and step == trainer.state.max_steps and step > case.by:  # train() was content
            found = compare(answers, setting.truth, case)
            if found.what == WRONG:
                return found
        what = REFUSED if _ADVICE.search(str(error)) else RAW
        return Outcome(what, f"{type(error).__name__}: {' '.join(str(error).split())}", step)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        by_trl = isinstance(error, ValueError) and "/trl/" in frames[-1].filename and _ADVICE.search(str(error))
        place = next((frame for frame in reversed(frames) if "/trl_refplug/" in frame.filename), frames[-1])
        where = f"{'/'.join(Path(place.filename).parts[-2:])}:{place.lineno}"
        return Outcome(BY_TRL if by_trl else RAW, f"({where}) {type(error).__name__}: {' '.join(str(error).split())}")
    return compare(answers, setting.truth, case)


def build(case: Case, setting: Setting, directory: Path, **more: Any) -> Any:
    """The trainer. Nothing is copied on the way: what shares its weights goes on sharing them."""
    options = {**case.options, **setting.options}
    if case.provider == "cached":
        options.setdefault("path", str(directory / "store"))
    values: dict[str, Any] = dict(
        ref_provider=case.provider,
        ref_provider_kwargs=options or None,
        disable_dropout=True,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        bf16=case.precision == "autocast",
    )
    if case.kind in ONLINE:
        values["temperature"] = setting.truth.temperature
    args = config(case.kind, directory / "out", **{**values, **case.args})
    given = {"ref_model": setting.ref_model, "peft_config": setting.peft_config, "reference": setting.reference}
    given = {name: value for name, value in given.items() if value is not None}
    if case.kind in ONLINE:
        given["reward_funcs"] = tiny.length_reward
    return (case.trainer or trainer_class(case.kind))(
        model=setting.policy,
        args=args,
        train_dataset=DATA[case.kind](),
        processing_class=copy.deepcopy(tiny.tokenizer()),
        callbacks=list(setting.callbacks),
        **given,
        **more,
    )


def text_rows(trainer: Any, kind: str) -> Batch:
    """Rows of the run's own data, padded on the right; for a trainer that has prompts alone, other text."""
    if kind == "dpo":
        rows = [(row["prompt_ids"], row[c]) for row in trainer.train_dataset for c in ("chosen_ids", "rejected_ids")]
    elif kind == "kto":
        rows = [(row["prompt_ids"], row["completion_ids"]) for row in trainer.train_dataset]
    else:
        ids = tiny.tokenizer()
        rows = [(ids(row["prompt"]).input_ids, ids(row["chosen"]).input_ids) for row in tiny.preference_data()]
    return padded([(list(prompt), list(completion)) for prompt, completion in rows[:6]])


def padded(rows: Sequence[tuple[list[int], list[int]]]) -> Batch:
    """Prompts and completions as one batch; the completions are scored."""
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids = torch.full((len(rows), width), tiny.tokenizer().pad_token_id)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (prompt, completion) in enumerate(rows):
        size = len(prompt) + len(completion)
        ids[row, :size] = torch.tensor(prompt + completion)
        mask[row, :size] = 1
        labels[row, len(prompt) : size] = torch.tensor(completion)
    return ids, mask, labels


def compare(answers: Answers, truth: Truth, case: Case) -> Outcome:
    """The worst of all answers."""
    worst = Outcome(RIGHT)
    for where, batch, answer in answers.given:
        found = apart(answer, batch, truth, BFLOAT16 if case.precision != "float32" else FLOAT32)
        if found.what == WRONG and (worst.what == RIGHT or found.nats > worst.nats):
            worst = Outcome(WRONG, f"{where}{found.detail}", nats=found.nats)
    asked = {where: answer for where, _, answer in answers.given}
    if worst.what == RIGHT and case.precision == "bf16" and END in asked:
        drift = (asked[END] - asked[BUILT]).abs().max().item()
        if drift > DRIFT:  # rounding is the same each time
            return Outcome(WRONG, "from the beginning to the end", nats=drift)
    return worst


def apart(answer: Tensor, batch: Batch, truth: Truth, tolerance: tuple[float, float]) -> Outcome:
    """Whether an answer is right, and how far off it is."""
    try:
        expected = truth.log_probs(*batch)
    except (IndexError, RuntimeError) as error:
        return Outcome(WRONG, f" (there is no answer: {error})", nats=float("inf"))
    scored = batch[2][:, 1:] != -100
    difference = (answer.double() - expected).abs()[scored]
    largest, mean = difference.max().item(), difference.mean().item()
    return Outcome(RIGHT if largest <= tolerance[0] and mean <= tolerance[1] else WRONG, nats=largest)
