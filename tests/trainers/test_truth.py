"""
The reference that training uses is the one that was declared, or training is refused.

Every case is trained, and all that its reference answers is compared with an oracle which shares nothing with the
package: see `oracle.py`. What neither answers right nor refuses in time fails.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import DPOTrainer
from trl.experimental.bema_for_ref_model import BEMACallback
from trl.experimental.bema_for_ref_model import DPOTrainer as BEMATrainer

from trl_refplug import (
    Capabilities,
    ReferenceBatch,
    ReferenceIdentity,
    ReferenceProvider,
    RefPlugDPOTrainer,
    RefPlugError,
    plug,
)
from trl_refplug.rows import Row
from trl_refplug.scoring import Scorer

from .. import tiny
from ..serving.servers import serving
from . import truth_models as models
from .oracle import Truth
from .truth import (
    BOTH,
    FLOAT32,
    REFUSED,
    RIGHT,
    WRONG,
    Answers,
    Case,
    Setting,
    apart,
    build,
    compare,
    outcome,
    text_rows,
)
from .truth_cases import CASES, CHANGES, HEADS, SCORED, SLOW, scaled_adapter
from .truth_models import lora, new_adapter, own_adapter


def slow(*values):
    """Values of a parameter that are for the slow selection."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in CASES])
def test_right_or_refused(case: Case, tmp_path):
    check(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in SLOW])
def test_right_or_refused_slow(case: Case, tmp_path):
    check(case, tmp_path)


def check(case: Case, directory: Path) -> None:
    found = outcome(case, directory)
    assert found.what in case.allowed, str(found)
    if found.what == REFUSED:
        assert found.step <= case.by, f"refused after step {found.step}, which is late: {found.detail}"


@pytest.mark.parametrize("mode", ["exact", "packed"])
@pytest.mark.parametrize("name", SCORED)
def test_scorer_by_itself(name, mode):
    model = SCORED[name]()
    truth, rows = Truth(model), text_rows(None, "grpo")
    answers = []
    try:
        scorer = Scorer(model, mode=mode)
        answers.append(scorer.log_probs(ReferenceBatch(*(tensor.clone() for tensor in rows), {})))
        answers.append(row_by_row(scorer, rows))
    except RefPlugError:
        return
    for answer in answers:
        found = apart(answer, rows, truth, FLOAT32)
        assert found.what == RIGHT, f"{name} by {found.nats} nats"


def row_by_row(scorer, rows):
    """What [`Scorer.score_rows`] says, in the form of a batch."""
    ids, mask, labels = rows
    lengths = mask.sum(1).tolist()
    given = [Row(ids[i, :n].numpy(), labels[i, :n].numpy()) for i, n in enumerate(lengths)]
    answer = torch.zeros(len(ids), ids.shape[1] - 1)
    for index, values in scorer.score_rows(given):
        answer[index][labels[index, 1:] != -100] = values
    return answer


@pytest.mark.parametrize("name", ["lora-on-head", "lora-on-tied-head", "saved-head", "plain-adapter", "head-hook"])
def test_served_model(name, tmp_path):
    """What a server answers, of a model that its engine was given."""
    from trl_refplug.serving.engine import Engine

    model = SCORED[name]().eval()
    truth = Truth(model)
    try:
        engine = Engine(model, name, scoring="packed", tokenizer=tiny.tokenizer())
    except RefPlugError:
        return
    with serving(engine) as url:
        options = {"url": url, "starts_as_policy": False}
        check(Case(name, lambda _: Setting(tiny.model(seed=2), truth), "remote", options), tmp_path)


@pytest.mark.parametrize("scoring", ["packed", "exact"])
@pytest.mark.parametrize("name", ["plain-adapter", "lora-on-head", "saved-head", "tokens"])
def test_served_adapter(name, scoring, tmp_path):
    """What `trl-refplug serve ADAPTER` answers."""
    from trl_refplug.serving.loading import load_engine

    configs = {"plain-adapter": lora(), "tokens": lora(trainable_token_indices=[1, 2, 40])}
    config = configs[name] if name in configs else HEADS[name][0]
    path = models.saved_adapter(tmp_path, config)
    truth = Truth(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny.saved(tmp_path / "base")), path))
    try:
        engine = load_engine(path, scoring=scoring, device="cpu")
    except RefPlugError:
        return
    with serving(engine) as url:
        options = {"url": url, "starts_as_policy": False}
        check(Case(name, lambda _: Setting(tiny.model(seed=2), truth), "remote", options), tmp_path)


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
@pytest.mark.parametrize("harmful", [False, True])
def test_server_whose_model_changes(kind, harmful, tmp_path):
    from trl_refplug.serving.engine import Engine

    policy, served = tiny.model(), tiny.model().eval()

    def harm(trainer):
        with torch.no_grad():
            served.model.layers[1].mlp.down_proj.weight.mul_(1.01)

    with serving(Engine(served, "served", scoring="packed", tokenizer=tiny.tokenizer())) as url:
        setting = Setting(policy, Truth(policy), harm=harm if harmful else None)
        allowed = (REFUSED,) if harmful else (RIGHT,)
        case = Case("served", lambda _: setting, "remote", {"url": url}, kind, allowed, by=2)
        check(case, tmp_path)


class OfAThirdParty(ReferenceProvider):
    """A copy of the policy as it starts, scored by ordinary logits; `bent` is done to it by and by."""

    capabilities = Capabilities(local_model=True, temperature=True, offline=True)

    def pin(self, context):
        self.truth = Truth(context.policy)

    @property
    def starts_as_policy(self):
        return True

    def identity(self):
        return ReferenceIdentity("third", "0" * 32, {})

    def log_probs(self, batch):
        return self.truth.log_probs(batch.input_ids, batch.attention_mask, batch.labels).float()


@pytest.mark.parametrize("kind", ["dpo", "kto", "grpo"])
@pytest.mark.parametrize("harmful", [False, True])
def test_provider_of_a_third_party(kind, harmful, tmp_path):
    policy, provider = tiny.model(), OfAThirdParty()

    def harm(trainer):
        with torch.no_grad():
            provider.truth.model.model.layers[1].mlp.down_proj.weight.mul_(1.01)

    setting = Setting(policy, Truth(policy), reference=provider, harm=harm if harmful else None)
    allowed = (REFUSED,) if harmful else (RIGHT,)
    check(Case("third", lambda _: setting, kind=kind, allowed=allowed, by=2), tmp_path)


class Bending(DPOTrainer):
    """A subclass that changes the policy's base once it has been constructed."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        models.norm_scaled(self)


@pytest.mark.parametrize("provider", ["auto", "cached", "ema"])
@pytest.mark.parametrize("make", [new_adapter(lora()), own_adapter(lora())], ids=["new", "own"])
def test_policy_bent_by_a_subclass(make, provider, tmp_path):
    check(Case("bent", make, provider, trainer=plug(Bending)), tmp_path)


BENT = {
    **{name: models.changed(change) for name, change in CHANGES.items()},
    "gemma-capped": models.changed(lambda m: setattr(m.config, "final_logit_softcapping", 5.0), architecture="gemma2"),
    "adapter-scaled": own_adapter(lora(), change=scaled_adapter),
    "adapter-merged": own_adapter(lora(), change=lambda model: model.merge_adapter()),
    "adapter-pissa": own_adapter(lora(init_lora_weights="pissa")),
}
STRAIGHT = {
    **{name: models.full() for name in CHANGES},
    "gemma-capped": models.full(architecture="gemma2"),
    "adapter-scaled": own_adapter(lora()),
    "adapter-merged": own_adapter(lora()),
    "adapter-pissa": own_adapter(lora(init_lora_weights="pissa")),
}


@pytest.mark.parametrize("bent_first", [False, True], ids=["straight-first", "bent-first"])
@pytest.mark.parametrize("name", ["hook", "adapter-pissa", *slow(*sorted(BENT.keys() - {"hook", "adapter-pissa"}))])
@pytest.mark.parametrize("verify", [0, 4])
def test_one_store_for_two_models(verify, name, bent_first, tmp_path):
    """What one model answered is never found by a run with another one, however few rows are scored again."""
    options = {"path": str(tmp_path / "store"), "verify": verify}
    makes = [STRAIGHT[name], BENT[name]]
    for number, make in enumerate(reversed(makes) if bent_first else makes):
        (tmp_path / str(number)).mkdir()
        check(Case(name, make, "cached", options), tmp_path / str(number))


@pytest.mark.parametrize("make", [new_adapter(lora()), own_adapter(lora())], ids=["new", "own"])
def test_store_after_a_run_that_drifted(make, tmp_path):
    """What was scored lazily with weights that had moved is not what the next run finds."""
    options = {"path": str(tmp_path / "store"), "fill": "lazy"}
    for number, harm in enumerate((models.scaled(1.3), None)):
        (tmp_path / str(number)).mkdir()
        case = Case("lazy", make, "cached", options, harm=harm, by=2)
        found = outcome(case, tmp_path / str(number))
    assert found.what in BOTH, str(found)


@pytest.mark.parametrize("name", ["attention", *slow("frequencies", "hook")])
@pytest.mark.parametrize("provider", ["auto", *slow("frozen", "cached", "ema")])
def test_resumed_on_a_bent_base(provider, name, tmp_path):
    """The base has changed between a checkpoint and its resume, in what no digest covers."""
    first = build(
        Case("first", new_adapter(lora()), provider, args={"max_steps": 2}), new_adapter(lora())(tmp_path), tmp_path
    )
    first.train()
    setting = new_adapter(lora())(tmp_path)
    CHANGES[name](setting.policy)
    with pytest.raises(RefPlugError):
        build(Case("second", new_adapter(lora()), provider), setting, tmp_path).train(
            resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2")
        )


@pytest.mark.parametrize("provider", ["auto", *slow("frozen", "cached", "ema")])
@pytest.mark.parametrize(
    "make", [models.full(), new_adapter(lora()), own_adapter(lora())], ids=["whole", "new", "own"]
)
def test_resumed_as_it_was(make, provider, tmp_path):
    """No false alarm where nothing has changed between a checkpoint and its resume."""
    options = {"path": str(tmp_path / "store")} if provider == "cached" else {}
    case = Case("first", make, provider, options, args={"max_steps": 2})
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    build(case, make(tmp_path / "one"), tmp_path).train()
    setting = make(tmp_path / "two")
    trainer = build(Case("second", make, provider, options), setting, tmp_path)
    answers = Answers(trainer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    answers.ask("at the end", text_rows(trainer, "dpo"))
    assert len(answers.given) > 1
    assert str(compare(answers, setting.truth, case)) == RIGHT


@pytest.mark.parametrize("provider", ["auto", *slow("frozen", "cached", "ema")])
@pytest.mark.parametrize(
    "make", [models.full(), new_adapter(lora()), own_adapter(lora())], ids=["whole", "new", "own"]
)
def test_trained_twice(make, provider, tmp_path):
    """No false alarm in a second call of `train`, nor in an evaluation before, between and after the two."""
    case, setting = Case("twice", make, provider, args={"per_device_eval_batch_size": 4}), make(tmp_path)
    trainer = build(case, setting, tmp_path, eval_dataset=tiny.preference_data(6))
    answers = Answers(trainer)
    trainer.evaluate()
    for _ in range(2):
        trainer.train()
        trainer.evaluate()
    answers.ask("at the end", text_rows(trainer, "dpo"))
    assert len(answers.given) == 2 * 4 + 3 * 2 + 1
    assert str(compare(answers, setting.truth, case)) == RIGHT


@pytest.mark.parametrize("how", ["warn", "off"])
def test_check_that_does_not_stop(how, tmp_path, caplog):
    """`ref_check` says what becomes of a reference that has moved."""
    case = Case("scaled", new_adapter(lora()), harm=models.scaled(1.3), args={"ref_check": how})
    assert outcome(case, tmp_path).what == WRONG
    assert any(record.levelno >= logging.WARNING for record in caplog.records) == (how == "warn")


class Average(TrainerCallback):
    """The moving average of a policy's weights, adapters merged, by the formula of the paper: one for each step."""

    def __init__(self, start, policy, alpha):
        self.policy, self.alpha = policy, alpha
        self.truths = [Truth(start)]

    def on_step_end(self, *args, **kwargs):
        policy = copy.deepcopy(self.policy)
        weights = (policy.merge_and_unload() if hasattr(policy, "peft_config") else policy).state_dict()
        average = copy.deepcopy(self.truths[-1].model)
        with torch.no_grad():
            for name, mean in average.named_parameters():
                mean.lerp_(weights[name], self.alpha)
        self.truths.append(Truth(average))


@pytest.mark.parametrize("config", [None, lora()], ids=["whole", "adapter"])
def test_reference_that_follows(config, tmp_path):
    """A reference that moves is not taken for one that has been tampered with, and is the average of the policy."""
    options = {"alpha": 0.5, "sync_steps": 1}
    policy = tiny.model()
    case = Case("ema", models.full(), "ema", options)
    trainer = build(case, Setting(policy, Truth(policy), peft_config=copy.deepcopy(config)), tmp_path)
    average = Average(tiny.model(), trainer.model, 0.5)
    trainer.callback_handler.callbacks.insert(0, average)
    answers = Answers(trainer)
    trainer.train()
    assert [where for where, _, _ in answers.given] == [f"in step {step}" for step in (1, 2, 3, 4)]
    for (where, batch, answer), truth in zip(answers.given, average.truths, strict=False):
        found = apart(answer, batch, truth, (5e-3, 1e-3))
        assert found.what == RIGHT, f"{where} by {found.nats} nats"


def bema(**options):
    values = {"update_freq": 1, "ref_model_update_freq": 2, "update_ref_model": True, "lag": 1, **options}
    return BEMACallback(**values)


@pytest.mark.parametrize("provider", ["auto", "cached", *slow("frozen", "ema")])
@pytest.mark.parametrize("config", [None, lora()], ids=["whole", "adapter"])
def test_bema(config, provider, tmp_path):
    """TRL's callback that has the reference follow: followed as TRL's own reference does, or refused."""
    policy = tiny.model()
    case = Case("bema", models.full(), provider, trainer=plug(BEMATrainer), args={"max_steps": 6})
    setting = Setting(copy.deepcopy(policy), Truth(policy), peft_config=copy.deepcopy(config), callbacks=[bema()])
    try:
        ours = build(case, setting, tmp_path)
        given = Answers(ours).given
        ours.train()
    except RefPlugError:
        return
    assert config is None, "TRL writes the average of what is trained into the base, which no reference is meant to be"
    theirs = build(
        Case("bema", models.full(), trainer=BEMATrainer, args={"max_steps": 6}),
        Setting(copy.deepcopy(policy), Truth(policy), ref_model=copy.deepcopy(policy), callbacks=[bema()]),
        tmp_path / "theirs",
    )
    expected = Answers(theirs).given
    theirs.train()
    assert len(given) == len(expected)
    for (where, _, answer), (_, _, right) in zip(given, expected, strict=True):
        torch.testing.assert_close(answer, right, atol=1e-3, rtol=0, msg=lambda text, where=where: f"{where}: {text}")


@pytest.mark.parametrize("cls", [RefPlugDPOTrainer, plug(BEMATrainer)], ids=["plain", "bema"])
def test_bema_that_leaves_the_reference(cls, tmp_path):
    """The same callback, when it only keeps an average beside training."""
    setting = models.full()(tmp_path)
    setting.callbacks = [bema(update_ref_model=False)]
    check(Case("bema", lambda _: setting, trainer=cls, allowed=(RIGHT,)), tmp_path)
