"""
Providers with one fault each, and the conformance tests of every one. `test_planted_faults.py` runs this file, and
compares the tests that fail with those that each fault says it is caught by.
"""

from __future__ import annotations

import copy
import gc
import math
import os
import random
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from trl_refplug import Capabilities, ReferenceIdentity, ReferenceProvider
from trl_refplug.models.identity import digest_model
from trl_refplug.plugins import RegisteredProvider, plugin_manager
from trl_refplug.rows import PaddedRows
from trl_refplug.testing import ReferenceProviderTests, tiny_policy


# Sound providers


@dataclass(frozen=True)
class SoundOptions:
    sharpness: float = field(default=1.0, metadata={"help": "Multiplies logits."})
    note: str = field(default="", metadata={"help": "Changes nothing."})


class Sound(ReferenceProvider):
    """A plain and correct provider: a copy of the policy as it was passed in. All faults are planted in this one."""

    Options = SoundOptions
    capabilities = Capabilities(local_model=True, overlap=True, temperature=True, multimodal=True, offline=True)

    def pin(self, context):
        self.model = copy.deepcopy(context.policy).eval().requires_grad_(False)
        self.digest = digest_model(context.policy)

    def setup(self, context):
        self.context = context
        self.temperature = context.temperature
        self.pool = ThreadPoolExecutor(2)

    def identity(self):
        return ReferenceIdentity(
            "sound", f"{self.digest}-{self.options.sharpness}", {"sharpness": self.options.sharpness}
        )

    def logits(self, batch):
        return self.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **batch.extras
        ).logits

    def log_probs(self, batch):
        with torch.no_grad():
            return self.score(batch)

    def score(self, batch):
        logits = self.logits(batch)[:, :-1] * (self.options.sharpness / self.temperature)
        targets = batch.labels[:, 1:]
        log_probs = logits.log_softmax(-1).gather(2, targets.clamp(min=0)[..., None]).squeeze(2)
        return torch.where(targets != -100, log_probs, 0.0)

    def submit(self, batch):
        return self.pool.submit(self.log_probs, batch)

    def close(self):
        pool = getattr(self, "pool", None)
        if pool is not None:
            pool.shutdown(wait=False)


class SoundMoving(Sound):
    """After every step, the reference becomes the average of itself and the policy."""

    capabilities = replace(Sound.capabilities, moving=True, overlap=False, offline=False)
    submit = ReferenceProvider.submit

    def on_step_end(self, step):
        with torch.no_grad():
            for mine, theirs in zip(self.model.parameters(), self.context.policy.parameters(), strict=True):
                mine.lerp_(theirs, 0.5)

    def save_state(self, directory):
        torch.save(self.model.state_dict(), directory / "reference.pt")

    def load_state(self, directory):
        self.model.load_state_dict(torch.load(directory / "reference.pt"))


# Faults. Each of them names the tests that must catch it. No other test may fail.

AREAS = ("answers", "abilities", "effects", "identities", "runs", "life")
FAULTS: dict[str, dict[type, set[str]]] = {area: {} for area in AREAS}


def caught_by(area: str, *tests: str) -> Any:
    def plant(provider: type) -> type:
        FAULTS[area][provider] = {f"test_{test}" for test in tests}
        return provider

    return plant


@caught_by("answers")
class NoFault(Sound):
    pass


@caught_by("answers")
class NoFaultMoving(SoundMoving):
    pass


@caught_by("answers", "form")
class EveryPosition(Sound):
    def log_probs(self, batch):
        return torch.nn.functional.pad(super().log_probs(batch), (1, 0))


@caught_by("answers", "form")
class Float64(Sound):
    def log_probs(self, batch):
        return super().log_probs(batch).double()


@caught_by("answers", "form")
class ListOfRows(Sound):
    def log_probs(self, batch):
        return list(super().log_probs(batch))


@caught_by("answers", "deterministic")
class ForgetsEvaluationMode(Sound):
    """Scores in the mode that the policy is in, so with dropout."""

    starts_as_policy = True

    def pin(self, context):
        super().pin(context)
        self.model.train()


@caught_by("answers", "deterministic")
class SamplesItsAnswer(Sound):
    """Estimates values with random numbers of its own."""

    def pin(self, context):
        super().pin(context)
        self.generator = torch.Generator()

    def score(self, batch):
        log_probs = super().score(batch)
        return log_probs * (1 + 0.1 * torch.rand(log_probs.shape, generator=self.generator))


@caught_by("answers", "values")
class OffByOne(Sound):
    def logits(self, batch):
        return super().logits(batch).roll(-1, dims=1)


@caught_by("answers", "values")
class AnotherModel(Sound):
    def pin(self, context):
        super().pin(context)
        with torch.no_grad():
            self.model.get_output_embeddings().weight.mul_(1.1)


@caught_by("answers", "values")
class RawLogits(Sound):
    def score(self, batch):
        targets = batch.labels[:, 1:]
        chosen = self.logits(batch)[:, :-1].gather(2, targets.clamp(min=0)[..., None]).squeeze(2)
        return torch.where(targets != -100, chosen * (self.options.sharpness / self.temperature), 0.0)


@caught_by("answers", "zero_where_nothing_is_scored")
class NotZeroed(Sound):
    def score(self, batch):
        return super().score(replace(batch, labels=batch.input_ids))


@caught_by("answers", "row_with_nothing_scored")
class DividesByCount(Sound):
    def score(self, batch):
        count = (batch.labels[:, 1:] != -100).sum(1, keepdim=True)
        return super().score(batch) / count * count


@caught_by("answers", "row_with_nothing_scored")
class DropsEmptyRows(Sound):
    """Scores only rows that have scored tokens, and puts their values into the first rows of the answer."""

    def score(self, batch):
        answer = super().score(batch)
        full = (batch.labels[:, 1:] != -100).any(1)
        packed = torch.zeros_like(answer)
        packed[: int(full.sum())] = answer[full]
        return packed


@caught_by("answers", "padding_side")
class IgnoresMask(Sound):
    def logits(self, batch):
        return super().logits(replace(batch, attention_mask=torch.ones_like(batch.attention_mask)))


@caught_by("answers", "padding_side")
class LengthsForPositions(Sound):
    """Assumes that a row's tokens come first, and its padding after them."""

    def score(self, batch):
        lengths = batch.attention_mask.sum(1, keepdim=True)
        within = torch.arange(batch.input_ids.shape[1] - 1, device=lengths.device) < lengths - 1
        return torch.where(within, super().score(batch), 0.0)


@caught_by("answers", "padding_content")
class PaddingById(Sound):
    """Recognizes padding by the padding token, which completions may contain."""

    capabilities = replace(Sound.capabilities, multimodal=False)

    def logits(self, batch):
        mask = (batch.input_ids != self.context.processing_class.pad_token_id).long()
        return super().logits(replace(batch, attention_mask=mask & batch.attention_mask))


@caught_by("answers", "padding_content")
class MaskById(PaddingById):
    """Does the same without looking at the trainer's mask."""

    def logits(self, batch):
        return super().logits(replace(batch, attention_mask=torch.ones_like(batch.attention_mask)))


@caught_by("answers", "rows_alone")
class SqueezesSingleRow(Sound):
    def score(self, batch):
        return super().score(batch).squeeze(0)


@caught_by("answers", "rows_alone")
class AnotherKernelForOneRow(Sound):
    """Scores a row that is alone in its batch by other code, which is wrong."""

    def score(self, batch):
        answer = super().score(batch)
        return answer if len(answer) > 1 else answer * 0.99


@caught_by("answers", "row_order")
class SortsRows(Sound):
    """Scores long rows first and forgets to put the answers back in order."""

    capabilities = replace(Sound.capabilities, multimodal=False)

    def score(self, batch):
        order = batch.attention_mask.sum(1).argsort(descending=True, stable=True)
        answer, mask = super().score(batch)[order], batch.labels[:, 1:] != -100
        return torch.where(mask, answer, 0.0)


@caught_by("answers", "answer_is_the_callers")
class KeepsAnswers(Sound):
    """Keeps its answers, and hands out the very tensors that it keeps."""

    def log_probs(self, batch):
        kept = self.__dict__.setdefault("kept", {})
        key = batch.input_ids.numpy().tobytes(), batch.labels.numpy().tobytes(), batch.attention_mask.numpy().tobytes()
        if key not in kept:
            kept[key] = super().log_probs(batch)
        return kept[key]


@caught_by("answers", "answer_is_the_callers")
class ReusesMemory(Sound):
    """Writes all answers of the same shape into the same memory."""

    def log_probs(self, batch):
        answer = super().log_probs(batch)
        return self.__dict__.setdefault("memory", {}).setdefault(answer.shape, answer.clone()).copy_(answer)


@caught_by("answers", "broken_weights_are_not_hidden")
class HidesNaN(Sound):
    def score(self, batch):
        return super().score(batch).nan_to_num()


@caught_by("answers", "temperature")
class IgnoresTemperature(Sound):
    def setup(self, context):
        super().setup(context)
        self.temperature = 1.0


@caught_by("answers", "images")
class DropsImages(Sound):
    def logits(self, batch):
        return super().logits(replace(batch, extras={}))


@caught_by("effects", "no_gradient")
class LeaksGradient(Sound):
    def pin(self, context):
        super().pin(context)
        self.model.requires_grad_(True)

    def log_probs(self, batch):
        return self.score(batch)


@caught_by("effects", "no_gradient")
class SubmitLeaksGradient(Sound):
    """Forgets that every thread has its own gradient mode."""

    def pin(self, context):
        super().pin(context)
        self.model.requires_grad_(True)

    def submit(self, batch):
        return self.pool.submit(self.score, batch)


def planted_in_log_probs(effect: Any) -> Any:
    """A class decorator: `effect(provider, batch)` is called after every answer."""

    def change(provider: type) -> type:
        def log_probs(self: Any, batch: Any) -> Any:
            answer = Sound.log_probs(self, batch)
            effect(self, batch)
            return answer

        provider.log_probs = log_probs
        return provider

    return change


@caught_by("effects", "random_streams")
@planted_in_log_probs(lambda self, batch: torch.rand(1))
class DrawsFromTorch(Sound):
    # Asked ahead of time, it would draw at another time after a resume
    capabilities = replace(Sound.capabilities, overlap=False)
    submit = ReferenceProvider.submit


@caught_by("effects", "random_streams")
@planted_in_log_probs(lambda self, batch: random.random())
class DrawsFromPython(Sound):
    pass


@caught_by("effects", "modes", "trains")  # gradient checkpointing fails with it
@planted_in_log_probs(lambda self, batch: self.context.policy.eval())
class LeavesEvaluationMode(Sound):
    pass


@caught_by("effects", "modes")
@planted_in_log_probs(lambda self, batch: self.context.policy.lm_head.eval())
class LeavesOneModuleInEvaluationMode(Sound):
    capabilities = replace(Sound.capabilities, multimodal=False)


@caught_by("effects", "requires_grad")
@planted_in_log_probs(lambda self, batch: self.context.policy.get_input_embeddings().requires_grad_(False))
class FreezesEmbeddings(Sound):
    pass


@caught_by("effects", "requires_grad")
class FreezesInSetup(Sound):
    def setup(self, context):
        super().setup(context)
        context.policy.get_input_embeddings().requires_grad_(False)


@caught_by("effects", "weights")
@planted_in_log_probs(lambda self, batch: next(self.context.policy.parameters()).data.mul_(1.001))
class ChangesWeights(Sound):
    pass


@caught_by("effects", "batch")
@planted_in_log_probs(lambda self, batch: batch.labels.clamp_(min=0))
class ChangesLabels(Sound):
    pass


@caught_by("effects", "batch")
@planted_in_log_probs(lambda self, batch: batch.attention_mask.zero_())
class ChangesMask(Sound):
    pass


class NoFaultWithAdapter(Sound):
    """For faults with a policy that has two adapters: its own, which is active, and another one, which is not."""

    capabilities = replace(Sound.capabilities, multimodal=False)

    @staticmethod
    def policy():
        config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        policy = get_peft_model(tiny_policy(), config)
        policy.add_adapter("other", config)
        return policy

    def pin(self, context):
        super().pin(context)
        self.digest = digest_model(context.policy, "default")


caught_by("effects")(NoFaultWithAdapter)


def activate_other(self: Any, batch: Any) -> None:
    for module in self.context.policy.modules():
        if hasattr(module, "_active_adapter"):
            module._active_adapter = ["default", "other"]


@caught_by("effects", "active_adapter")
@planted_in_log_probs(activate_other)
class LeavesAnotherAdapterActive(NoFaultWithAdapter):
    pass


@caught_by("identities", "identity_is_json")
class DtypeInIdentity(Sound):
    def identity(self):
        return replace(super().identity(), details={"dtype": torch.float32})


@caught_by("identities", "identity_is_json")
class TupleInIdentity(Sound):
    def identity(self):
        return replace(super().identity(), details={"shape": (1, 2)})


@caught_by("identities", "identity_is_the_same_again")
class PathInIdentity(Sound):
    def pin(self, context):
        super().pin(context)
        self.digest += context.policy.config._name_or_path


@caught_by("identities", "identity_is_the_same_again", "identity_follows_the_options", "resumes")
class RandomIdentity(Sound):
    def pin(self, context):
        super().pin(context)
        self.digest = uuid.uuid4().hex


@caught_by("identities", "identity_follows_the_weights")
class ConstantIdentity(Sound):
    def pin(self, context):
        super().pin(context)
        self.digest = "the policy"


@caught_by("identities", "identity_follows_the_weights")
class ShapesForWeights(Sound):
    def pin(self, context):
        super().pin(context)
        self.digest = str([tuple(parameter.shape) for parameter in context.policy.parameters()])


@caught_by("identities", "identity_follows_the_weights")
class IdentityOfUnusedWeights(Sound):
    """Every token is equally likely, whatever the weights are."""

    capabilities = replace(Sound.capabilities, multimodal=False)

    def score(self, batch):
        vocabulary = self.context.policy.config.vocab_size
        return (batch.labels[:, 1:] != -100) * torch.tensor(-math.log(vocabulary) * self.options.sharpness)

    @staticmethod
    def expected(policy, batch, temperature):
        return torch.full(batch.labels[:, 1:].shape, -math.log(policy.config.vocab_size))


@caught_by("identities", "identity_follows_the_options")
class OptionsNotInIdentity(Sound):
    def identity(self):
        return ReferenceIdentity("sound", self.digest)


@caught_by("identities", "identity_follows_the_options")
class IdleOptionsInIdentity(Sound):
    def identity(self):
        return ReferenceIdentity("sound", f"{self.digest}-{self.options}")


@caught_by("identities", "identity_stays_in_training", "resumes")
class IdentityOfTheMovedPolicy(Sound):
    def identity(self):
        return ReferenceIdentity("sound", f"{digest_model(self.context.policy)}-{self.options.sharpness}")


@caught_by("runs", "trains")
class CountersOfText(Sound):
    def counters(self):
        return {"answers": "many"}


@caught_by("runs", "trains")
class FailsAtTheEnd(Sound):
    def on_train_end(self):
        raise RuntimeError("nothing to write to")


@caught_by("runs", "reference_stays")
class FollowsThePolicy(Sound):
    """Scores with the policy itself, which training changes."""

    capabilities = replace(Sound.capabilities, overlap=False)
    submit = ReferenceProvider.submit

    def logits(self, batch):
        return self.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **batch.extras
        ).logits

    def log_probs(self, batch):
        self.model.load_state_dict(self.context.policy.state_dict())
        return super().log_probs(batch)


@caught_by("runs", "resumes")
class PinsTooLate(Sound):
    """Copies the policy when it is asked for the first time. After a resume, that is the policy of the checkpoint."""

    def log_probs(self, batch):
        if "pinned" not in self.__dict__:
            self.model.load_state_dict(self.context.policy.state_dict())
            self.pinned = True
        return super().log_probs(batch)


@caught_by("runs", "metadata_is_json")
class PathInMetadata(Sound):
    def metadata(self):
        return {"dtype": torch.float32}


@caught_by("runs", "reference_moves")
class NeverMoves(SoundMoving):
    def on_step_end(self, step):
        pass


@caught_by("runs", "resumes")
class ForgetsItsState(SoundMoving):
    def load_state(self, directory):
        pass


@caught_by("runs", "resumes")
class SavesTheStart(SoundMoving):
    def pin(self, context):
        super().pin(context)
        self.start = copy.deepcopy(self.model.state_dict())

    def save_state(self, directory):
        torch.save(self.start, directory / "reference.pt")


@caught_by("runs", "submit", "resumes")  # after a resume, the first batch is not asked ahead of time
class SubmitForgetsZeros(Sound):
    def submit(self, batch):
        return self.pool.submit(
            lambda: super(SubmitForgetsZeros, self).log_probs(replace(batch, labels=batch.input_ids))
        )


@caught_by("runs", "several_in_flight")
class OneInFlight(Sound):
    """Remembers only one of the submitted batches."""

    def submit(self, batch):
        provider = self
        provider.pending = batch

        class Late(Future):
            def result(self, timeout=None):
                return provider.log_probs(provider.pending)

        return Late()


@caught_by("runs", "two_ranks")
class OnlyTheFirstRank(Sound):
    def score(self, batch):
        return super().score(batch) * (1 if os.environ.get("RANK", "0") == "0" else 0.5)


@caught_by("runs", "two_ranks")
class IdentityOfTheRank(Sound):
    def identity(self):
        return replace(super().identity(), digest=f"{self.digest}-{self.options.sharpness}-{os.environ.get('RANK')}")


@caught_by("life", "capabilities")
class MovingAndOffline(SoundMoving):
    capabilities = replace(SoundMoving.capabilities, offline=True)


@caught_by("life", "capabilities")
class HiddenModel(Sound):
    capabilities = replace(Sound.capabilities, local_model=False)

    @property
    def module(self):
        return self.model


@caught_by("life", "options_are_frozen")
class MutableOptions(Sound):
    @dataclass
    class Options:
        sharpness: float = field(default=1.0, metadata={"help": "Multiplies logits."})
        note: str = field(default="", metadata={"help": "Changes nothing."})


@caught_by("life", "options_are_checked")
class UntypedOptions(Sound):
    @dataclass(frozen=True)
    class Options(SoundOptions):
        size: Any = field(default=None, metadata={"help": "Of what?"})


@caught_by("life", "options_have_help")
class SilentOptions(Sound):
    @dataclass(frozen=True)
    class Options(SoundOptions):
        size: int = 0


@caught_by("life", "close_twice")
class ClosesOnce(Sound):
    def close(self):
        if hasattr(self, "pool"):
            super().close()
            del self.pool
            self.closed = True
        elif hasattr(self, "closed"):
            raise RuntimeError("already closed")


@caught_by("life", "close_before_setup")
class ClosesAfterSetupOnly(Sound):
    def close(self):
        self.pool.shutdown()


class Able(Sound):
    """The same with the optional abilities: it takes a model, and scores in bulk."""

    capabilities = replace(Sound.capabilities, accepts_model=True)

    def __init__(self, options=None, *, model=None):
        super().__init__(options)
        self.given = model

    def pin(self, context):
        self.model = copy.deepcopy(self.given or context.policy).eval().requires_grad_(False)
        self.digest = digest_model(self.model)

    @contextmanager
    def bulk_scorer(self):
        yield self

    def score_passes(self, rows):
        padded = PaddedRows.flush_left(list(rows))
        values = padded.values_by_row(self.log_probs(padded.to_batch()))
        yield [(index, torch.from_numpy(found)) for index, found in enumerate(values)]


@caught_by("abilities")
class NoFaultAble(Able):
    pass


@caught_by("abilities", "accepts_model")
class IgnoresTheGivenModel(Able):
    def pin(self, context):
        self.given = None
        super().pin(context)


@caught_by("abilities", "bulk_scorer")
class DropsARowInBulk(Able):
    def score_passes(self, rows):
        for answers in super().score_passes(rows):
            yield answers[1:]


@caught_by("abilities", "as_source_of_a_store")
class AnotherModelWhereItMayLoadLate(Able):
    def pin(self, context):
        super().pin(context)
        if context.may_load_late:
            with torch.no_grad():
                self.model.get_output_embeddings().weight.mul_(1.1)


@caught_by("abilities", "availability")
class NeverAvailable(Able):
    unavailable = "the model is elsewhere"


@caught_by("abilities", "probe")
class DeclaresAnotherModel(Able):
    def declared_model(self, context):
        other = copy.deepcopy(self.model)
        with torch.no_grad():
            other.get_output_embeddings().weight.mul_(1.1)
        return nullcontext(other)


@caught_by("abilities", "probe_leaves_the_batch_alone")
class ProbesInPlace(Able):
    def probe(self, batch):
        answer = self.log_probs(batch)
        batch.labels.fill_(-100)
        return answer


def registered(provider: type) -> str:
    """A name under which `provider` can be selected in this process, as a plugin's can."""
    name = f"planted-{provider.__name__.lower()}"
    manager = plugin_manager()
    manager.providers[name] = RegisteredProvider(name, provider, manager.records[0])
    return name


def kit_for(provider: Any) -> type:
    """The conformance tests of a provider of this file."""

    class Tests(ReferenceProviderTests):
        @pytest.fixture
        def reference(self):
            return registered(provider) if provider in FAULTS["abilities"] else provider

        @pytest.fixture
        def other_options(self):
            return [{"sharpness": 0.5}, {"note": "hello"}]

        if hasattr(provider, "policy"):

            @pytest.fixture
            def policy(self):
                return provider.policy()

        if hasattr(provider, "expected"):

            def expected_log_probs(self, policy, batch, temperature):
                return provider.expected(policy, batch, temperature)

    Tests.__name__ = Tests.__qualname__ = f"Test{provider.__name__}"
    return Tests


for faults in FAULTS.values():
    for fault in faults:
        globals()[f"Test{fault.__name__}"] = kit_for(fault)

if __name__ != "__mp_main__":
    gc.freeze()  # trainers collect garbage often, and need not look at what was imported
