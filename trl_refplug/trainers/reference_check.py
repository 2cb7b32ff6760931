"""
`ref_check`: checks that the reference in use is the one that was declared, and that it stays so.

Before TRL touches anything, the declared model is asked for its ordinary logits on a few rows of text, the probe (see
`models/probe.py`). Later the provider is asked about the same rows, in the same way as training asks it: when TRL has
built its trainer, as training begins, with every checkpoint, and at the end. If the reference is declared to be the
policy as it starts, the first batch of training is also compared with the policy's own log-probs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer
from trl.trainer.utils import get_config_model_id

from trl_refplug.errors import ReferenceMismatchError
from trl_refplug.models.probe import Probe, Rows, ordinary_log_probs, probe_batch, probe_rows, runs_alone
from trl_refplug.models.tolerances import Tolerance, tolerance_for
from trl_refplug.models.weights import WeightMark, changed_weights, mark_weights
from trl_refplug.provider import ReferenceBatch, ReferenceIdentity, ReferenceProvider
from trl_refplug.rows import form_problem
from trl_refplug.trainers.context import Run, TrainerContext
from trl_refplug.trainers.policy import policy_log_probs


logger = logging.getLogger("trl_refplug")

_ROWS_SHOWN = 5

_BUILT = "when TRL had built its trainer"
_BEGUN = "as training began"

_UNMOVED = Tolerance(largest=1e-2, mean=1e-3)
"""Most by which a model in this process may differ from its own first answer, in low precision, too: the same kernels
compute the same rows. Where they do not, ten times what two first answers differ by is allowed."""


class ReferenceCheck:
    """
    Checks the reference of one trainer, and every provider that it is made of.

    Args:
        mode (`str`): The flag `ref_check`: `"error"`, `"warn"` or `"off"`.
        run ([`Run`]): The run.

    Attributes:
        rows (`np.ndarray` or `None`): The rows of the probe.
    """

    def __init__(self, mode: str, run: Run) -> None:
        self.rows: Rows | None = None
        self._mode = mode
        self._run = run
        # The key of both is the `id` of a provider, because a provider need not be hashable.
        self._truths: dict[int, Probe] = {}
        self._marks: dict[int, dict[str, WeightMark]] = {}
        # What each provider said as training began, and how far two such answers differ.
        self._first_answers: dict[int, tuple[Probe, float]] = {}
        self._held = "when it was pinned"
        self._warned_of_rounding = False

    # Before TRL touches anything

    def choose_rows(self, policy: Any, processing_class: Any, data: Any) -> None:
        """Choose the rows of the probe. Without `processing_class`, the tokenizer that TRL will load makes them."""
        if self._mode == "off":
            return
        tokenizer = _own_tokenizer(policy) if processing_class is None else processing_class
        self.rows = probe_rows(policy, tokenizer, data)

    def ask_declared(self, provider: ReferenceProvider, context: TrainerContext) -> None:
        """
        Ask the model that the provider declares about the probe, if there is one now, and it was not asked before.
        """
        if self.rows is None or id(provider) in self._truths:
            return
        with provider.declared_model(context) as model:
            if model is None or not runs_alone(model):
                return
            try:
                said = ordinary_log_probs(model, self.rows, self._run.temperature)
            except (RuntimeError, NotImplementedError, ImportError) as error:
                # Some kernels do not run on the device where the model is before it is placed. In that case the
                # provider's first answer is taken for the truth.
                logger.info("The declared reference cannot be asked before it is placed: %s", error)
                return
        origin = "the policy as it was passed in" if provider.starts_as_policy else "the model that was declared"
        self._truths[id(provider)] = Probe(self.rows, said, origin)

    # While the trainer is built and trains

    def built(self, provider: ReferenceProvider, context: TrainerContext) -> None:
        """To be called when TRL has built its trainer and `provider` is set up."""
        self.ask_declared(provider, context)
        self._ask(provider, _BUILT)
        if self._mode != "off":
            self._marks[id(provider)] = mark_weights(provider.weights())

    def training_begins(self, providers: Iterable[ReferenceProvider]) -> None:
        """To be called as training begins: the policy is placed, and the checkpoint is loaded if there is one."""
        for provider in providers:
            if not (provider.capabilities.moving and self._run.resumed):
                found = self._ask(provider, _BEGUN)
                if found is not None and provider.capabilities.local_model and not provider.capabilities.moving:
                    self._remember_first_answer(provider, found)
            self._compare_weights(provider, _BEGUN)
            if id(provider) in self._marks:
                # They are marked again, because placing the policy may have cast or sharded them.
                self._marks[id(provider)] = mark_weights(provider.weights())
        self._held = _BEGUN

    def still_holds(self, providers: Iterable[ReferenceProvider], when: str) -> None:
        """
        Check every reference that is declared not to move. Of a reference that moves, check the weights that must not.

        Args:
            when (`str`): The moment, for messages: "at step 10".
        """
        for provider in providers:
            if not provider.capabilities.moving:
                found = self._ask(provider, when)
                if found is not None and id(provider) in self._first_answers:
                    first, spread = self._first_answers[id(provider)]
                    allowed = self._tolerance(provider)
                    unmoved = Tolerance(
                        min(allowed.largest, max(_UNMOVED.largest, 10 * spread)),
                        min(allowed.mean, max(_UNMOVED.mean, 10 * spread)),
                    )
                    self._compare(provider, first, found, when, unmoved)
            self._compare_weights(provider, when)
        self._held = when

    def _ask(self, provider: ReferenceProvider, when: str) -> Tensor | None:
        """Ask about the probe, compare the answer with the truth, and return it; `None` if there is no answer."""
        found = self._answer(provider)
        if found is None or self.rows is None:
            return None
        truth = self._truths.get(id(provider))
        if truth is None:
            self._truths[id(provider)] = Probe(self.rows, found, f"its own answer {when}")
        else:
            self._compare(provider, truth, found, when, self._tolerance(provider))
        return found

    def _answer(self, provider: ReferenceProvider) -> Tensor | None:
        if self.rows is None:
            return None
        batch = probe_batch(self.rows, self._run.trainer.args.device)
        with torch.no_grad():
            found = provider.probe(batch)
        if found is None or form_problem(found, batch):  # the first answer in training will be refused for its form
            return None
        return found.float().cpu()

    def _remember_first_answer(self, provider: ReferenceProvider, found: Tensor) -> None:
        """What a model in this process says as training begins it says again, but for kernels that are not exact."""
        again = self._answer(provider)
        if again is not None and self.rows is not None:
            first = Probe(self.rows, found, "its own answer as training began")
            self._first_answers[id(provider)] = first, first.difference(again)[0]

    def _compare(
        self, provider: ReferenceProvider, truth: Probe, found: Tensor, when: str, tolerance: Tolerance
    ) -> None:
        largest, mean = truth.difference(found)
        if tolerance.allows(largest, mean):
            return
        self._fail(
            f"The reference {provider.identity()} is not the one that was declared: {when} it was asked about "
            f"{len(truth.rows)} short rows of text, and its log-probs differ from those of {truth.origin} by "
            f"{mean:.3g} nats per token on average (tolerance {tolerance.mean:g}) and by up to {largest:.3g} "
            f"(tolerance {tolerance.largest:g}). {self._last_held()}Likely causes: {_CAUSES}"
        )

    def _compare_weights(self, provider: ReferenceProvider, when: str) -> None:
        if id(provider) not in self._marks:
            return
        changed, rounded = changed_weights(self._marks[id(provider)], provider.weights())
        if not changed:
            return
        message = (
            f"{len(changed)} weights that the reference {provider.identity()} is made of "
            f"({', '.join(changed[:3])}{', ...' if len(changed) > 3 else ''}) are declared not to move, and are not "
            f"what they were. They were changed after the last check, {self._held}, and before this one, {when}."
        )
        if not rounded:
            self._fail(f"{message} Remove what changes them. Likely causes: {_CAUSES}")
        elif not self._warned_of_rounding:
            self._warned_of_rounding = True
            logger.warning(
                "%s They changed by no more than float32 rounding, which happens when an adapter is merged and taken "
                "out again, so training goes on. This is said once.",
                message,
            )

    def _last_held(self) -> str:
        return f"It was still right at the last check, {self._held}. "

    def _fail(self, message: str) -> None:
        if self._mode == "error":
            raise ReferenceMismatchError(message)
        logger.warning(message)

    def _tolerance(self, provider: ReferenceProvider) -> Tolerance:
        accelerator, policy = self._run.trainer.accelerator, self._run.trainer.model
        dtype: torch.dtype = getattr(accelerator.unwrap_model(provider.module or policy), "dtype", torch.float32)
        if provider.computes_in is not None:
            dtype = getattr(torch, provider.computes_in)
        return tolerance_for(str(accelerator.mixed_precision), dtype, accelerator.device.type)

    # Checkpoints

    def record(self, providers: Iterable[ReferenceProvider]) -> list[dict[str, Any] | None]:
        """
        The providers' answers to the probe, as a checkpoint keeps them: JSON values, in the order of the providers.
        """
        truths = [None if each.capabilities.moving else self._truths.get(id(each)) for each in providers]
        return [None if truth is None else truth.to_dict() for truth in truths]

    def compare_with_record(self, providers: Iterable[ReferenceProvider], record: list[Any]) -> None:
        """
        Ask every provider about the probe that the checkpoint was written with, and compare the answers.

        Raises:
            ReferenceMismatchError: A reference is not the one that training was started with (`ref_check="error"`).
        """
        if self._mode != "off":
            for provider, said in zip(providers, record, strict=False):
                if said is not None:
                    self._compare_with_saved(provider, Probe.from_dict(said))

    def _compare_with_saved(self, provider: ReferenceProvider, saved: Probe) -> None:
        with torch.no_grad():
            found = provider.probe(probe_batch(saved.rows, self._run.trainer.args.device))
        if found is not None:
            self._held = "when the checkpoint was written"
            truth = Probe(saved.rows, saved.log_probs, "the reference that the run was started with")
            self._compare(provider, truth, found, "as training was resumed", self._tolerance(provider))

    # The first batch

    def first_batch(self, provider: ReferenceProvider, batch: ReferenceBatch, log_probs: Tensor) -> None:
        """
        If the reference is declared to be the policy as it starts, compare its first answer with the policy's own.
        """
        trainer = self._run.trainer
        if self._mode == "off" or self._run.resumed or trainer.state.global_step > 0:
            return
        if not provider.starts_as_policy:
            logger.warning(
                "ref_check skipped for the first batch: the reference %s is not declared to be the policy as it "
                "starts. The probe was checked.",
                provider.identity(),
            )
            return
        if problem := difference_from_policy(trainer, batch, log_probs, provider.identity()):
            self._fail(problem)


_CAUSES = (
    "a callback, or the code around the trainer, changed the weights or the configuration of the policy's base or of "
    "the reference; an adapter rewrote the base's weights as it was added, or is on a layer that the fused LM head "
    "does not run; an adapter was merged and taken out again in half precision; a server has another model, revision "
    "or precision (if that is meant, its option is starts_as_policy=false). If this reference is what you want, "
    "declare it (name a model or an adapter), or set `ref_check` to 'warn' or 'off'."
)


def difference_from_policy(trainer: Any, batch: ReferenceBatch, log_probs: Tensor, identity: ReferenceIdentity) -> str:
    """
    Compare the reference's log-probs of a batch with those of the policy, which has not moved yet.

    Returns:
        `str`: What is wrong, if they differ by more than rounding; an empty string if not.
    """
    expected = policy_log_probs(trainer.model, batch).to(log_probs.device)
    scored = batch.labels[:, 1:] != -100
    difference = torch.where(scored, (log_probs - expected).abs(), 0.0)
    count = scored.sum().clamp(min=1)
    dtype = getattr(trainer.accelerator.unwrap_model(trainer.model), "dtype", torch.float32)
    tolerance = tolerance_for(str(trainer.accelerator.mixed_precision), dtype, trainer.accelerator.device.type)
    largest, mean = difference.max().item(), (difference.sum() / count).item()
    if tolerance.allows(largest, mean):
        logger.info("ref_check passed: %s equals the policy within %.1e nats per token.", identity, largest)
        return ""
    return (
        f"The reference {identity} was declared to be the policy as it starts, and its log-probs are not the "
        f"policy's: they differ by {mean:.3g} nats per token on average (tolerance {tolerance.mean:g}) and by up to "
        f"{largest:.3g} (tolerance {tolerance.largest:g}).\n{_table(log_probs, expected, scored)}\n"
        "Likely causes: the policy was changed after the trainer was built; the reference is another revision, "
        "precision or chat template; a custom model draws random numbers in eval mode. If this reference is what you "
        "want, declare it (name a model or an adapter), or set `ref_check` to 'warn' or 'off'."
    )


def _table(log_probs: Tensor, expected: Tensor, scored: Tensor) -> str:
    lines = ["row  scored tokens  reference sum  policy sum  largest difference"]
    off = (log_probs - expected).abs().masked_fill(~scored, 0.0).amax(dim=1)
    for row in off.argsort(descending=True)[:_ROWS_SHOWN].tolist():
        mask = scored[row]
        lines.append(
            f"{row:>3}  {int(mask.sum()):>13}  {log_probs[row][mask].sum().item():>13.4f}"
            f"  {expected[row][mask].sum().item():>10.4f}  {off[row].item():>18.4g}"
        )
    return "\n".join(lines)


def _own_tokenizer(policy: Any) -> Any:
    """The tokenizer that TRL will load for the policy; `None` if it has none."""
    try:
        return AutoTokenizer.from_pretrained(get_config_model_id(policy.config))
    except Exception:  # TRL will raise an error that says what is wrong
        return None
