"""A provider at work: it is attached to a small, real trainer, and nothing of the provider or of TRL is mocked."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor, nn

from trl_refplug.errors import InvalidLogProbsError, RefPlugError
from trl_refplug.options import parse_options
from trl_refplug.provider import Capabilities, ReferenceBatch, ReferenceProvider
from trl_refplug.rows.answers import form_problem
from trl_refplug.testing.samples import make_batch, preference_data, sample_rows, scored


Reference: TypeAlias = "str | type[ReferenceProvider] | tuple[str | type[ReferenceProvider], Mapping[str, Any]]"
"""A provider's class or registered name; or a pair of that and its options, a dict like `ref_provider_kwargs`."""


def require(holds: bool, message: str) -> None:
    """Fail the test if `holds` is false. It shows only `message`, which says what is wrong and what to do about it."""
    __tracebackhide__ = True
    if not holds:
        pytest.fail(message, pytrace=False)


class Attached:
    """
    A provider that is attached to a trainer and ready to answer.

    Args:
        trainer: One of trl-refplug's trainers.
        tolerance (`float`): Answers that differ by no more than this, in nats per token, count as the same.
    """

    def __init__(self, trainer: Any, tolerance: float) -> None:
        trainer.model.train()  # a training step asks for its reference in this mode
        self.trainer = trainer
        self.tolerance = tolerance
        self.provider: ReferenceProvider = trainer.ref_model.provider
        self.policy: nn.Module = trainer.model
        vocabulary = trainer.model.config.get_text_config().vocab_size
        self.rows = sample_rows(vocabulary)
        self.batch = make_batch(self.rows).to(trainer.args.device)

    def ask(self, batch: ReferenceBatch) -> Tensor:
        """
        Ask the provider, and return a copy of its answer. If even its usual answers have a wrong shape or dtype, the
        test is skipped, because nothing can be said about their values.
        """
        __tracebackhide__ = True
        with torch.no_grad():
            answer = self.provider.log_probs(batch.copy())
        problem = form_problem(answer, batch)
        if not problem:
            return answer.clone()
        with torch.no_grad():
            if form_problem(self.provider.log_probs(self.batch.copy()), self.batch):
                pytest.skip(f"needs answers of the right form, see test_form: {problem}")
        pytest.fail(f"For a batch {_shape(batch)}, {problem}. Answer every batch in the same form.", pytrace=False)

    def ask_rows(self, batch: ReferenceBatch) -> list[Tensor]:
        """Ask the provider, and return the scored values row by row. They do not depend on how the rows are padded."""
        __tracebackhide__ = True
        answer, mask = self.ask(batch), scored(batch)
        return [values[chosen] for values, chosen in zip(answer, mask, strict=True)]

    def train(self, **kwargs: Any) -> None:
        """Train. If the run fails for a reason that another test is about, the test is skipped."""
        __tracebackhide__ = True
        try:
            self.trainer.train(**kwargs)
        except InvalidLogProbsError as error:
            pytest.skip(f"needs answers of the right form, see test_form: {error}")
        except Exception as error:
            self.needs_determinism()
            pytest.skip(f"needs a run that ends, see test_trains: {type(error).__name__}: {error}")

    def require_same(self, found: list[Tensor], expected: list[Tensor], message: str) -> None:
        """Compare the scored values of rows. If they differ, fail with `message` and the largest difference."""
        __tracebackhide__ = True
        size, where = largest_difference(found, expected)
        require(
            not self.differs(found, expected),
            f"{message}\nLargest difference {size:.3g} nats (tolerance {self.tolerance:g}), at {where}.",
        )

    def differs(self, found: list[Tensor], other: list[Tensor]) -> bool:
        """
        Whether two answers differ by more than rounding. If they do, but the provider's answers vary even for the same
        batch, the test is skipped.
        """
        __tracebackhide__ = True
        different = largest_difference(found, other)[0] > self.tolerance
        if different:
            self.needs_determinism()
        return different

    def needs_determinism(self) -> None:
        """
        Skip the test if the provider answers the same batch differently each time: `test_deterministic` is about that.
        """
        __tracebackhide__ = True
        if largest_difference(self.ask_rows(self.batch), self.ask_rows(self.batch))[0] > self.tolerance:
            pytest.skip("needs the same answer to the same batch, see test_deterministic")


@dataclass(frozen=True)
class Bench:
    """
    Makes trainers that use the provider under test.

    Args:
        reference (`Reference`): The provider under test.
        policy (`nn.Module`): The policy. Every trainer gets a copy of it.
        processing_class: Its tokenizer or processor.
        peft_config: The `peft_config` argument of the trainers.
        directory (`Path`): The directory that trainers write into.
        tolerance (`float`): See [`Attached`].
    """

    reference: Reference
    policy: nn.Module
    processing_class: Any
    peft_config: Any
    directory: Path
    tolerance: float

    @property
    def provider_class(self) -> type[ReferenceProvider]:
        from trl_refplug.plugins import plugin_manager

        chosen = self.reference[0] if isinstance(self.reference, tuple) else self.reference
        if not isinstance(chosen, str):
            return chosen
        try:
            return plugin_manager().provider_class(chosen)
        except RefPlugError as error:
            problem = str(error)  # it says all there is to say; a traceback would be repeated by every test
        pytest.fail(problem, pytrace=False)

    @property
    def options(self) -> Mapping[str, Any]:
        return self.reference[1] if isinstance(self.reference, tuple) else {}

    def provider(self, **given: Any) -> ReferenceProvider:
        """A new instance of the provider, with its options. `given` may have a reference model for it, as `model`."""
        provider_class = self.provider_class
        return provider_class(parse_options(provider_class.__name__, provider_class.Options, self.options), **given)

    @property
    def capabilities(self) -> Capabilities:
        """
        What the provider can do with these options: if it is made of other providers, that depends on the instance.
        """
        return self.provider().capabilities

    def using(self, **changes: Any) -> Bench:
        """A bench like this one with another `policy`, `reference`, ..."""
        return replace(self, **changes)

    def with_options(self, options: Mapping[str, Any]) -> Bench:
        """A bench like this one with other options for the provider."""
        return replace(self, reference=(self.provider_class, options))

    def attach(self, *, dataset: Any = None, ref_model: nn.Module | None = None, **args: Any) -> Attached:
        """Make a DPO trainer with the provider, which gets `ref_model`. `args` go into the trainer's configuration."""
        from trl_refplug import RefPlugDPOConfig, RefPlugDPOTrainer

        trainer = RefPlugDPOTrainer(
            model=copy.deepcopy(self.policy),
            args=RefPlugDPOConfig(**self._args(args)),
            train_dataset=preference_data() if dataset is None else dataset,
            processing_class=self.processing_class,
            peft_config=copy.deepcopy(self.peft_config),
            reference=self.provider() if ref_model is None else self.provider(model=ref_model),
        )
        return Attached(trainer, self.tolerance)

    def attach_online(self, temperature: float) -> Attached:
        """Make a GRPO trainer with the provider. The trainer divides logits by `temperature`."""
        from trl_refplug import RefPlugGRPOConfig, RefPlugGRPOTrainer

        args = dict(num_generations=2, max_completion_length=4, beta=0.1, temperature=temperature)
        trainer = RefPlugGRPOTrainer(
            model=copy.deepcopy(self.policy),
            args=RefPlugGRPOConfig(**self._args(args)),
            train_dataset=preference_data().select_columns(["prompt"]),
            reward_funcs=lambda completions, **_: [0.0 for _ in completions],
            processing_class=self.processing_class,
            peft_config=copy.deepcopy(self.peft_config),
            reference=self.provider(),
        )
        return Attached(trainer, self.tolerance)

    def _args(self, given: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "output_dir": str(self.directory / "out"),
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 2e-2,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "disable_dropout": False,
            "disable_tqdm": True,
            # Each test makes its own comparisons. Only `test_probe`, which is about this check, switches it on.
            "ref_check": "off",
            **given,
        }


def largest_difference(found: list[Tensor], other: list[Tensor]) -> tuple[float, str]:
    """The largest difference between two answers' scored values, in nats, and where it is."""
    largest, where = 0.0, ""
    for row, (one, two) in enumerate(zip(found, other, strict=True)):
        if one.numel() == 0:
            continue
        off = (one.double() - two.double()).abs()
        off = torch.where(off.isnan(), torch.inf, off)
        place = int(off.argmax())
        if off[place] > largest:
            largest = off[place].item()
            where = f"row {row}, scored token {place}: {one[place].item():.6g} against {two[place].item():.6g}"
    return largest, where


def _shape(batch: ReferenceBatch) -> list[int]:
    return list(batch.input_ids.shape)
