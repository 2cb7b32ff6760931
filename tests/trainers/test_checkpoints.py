"""Checkpoints say which reference they were trained with, and a resumed run must have the same."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from trl_refplug import Capabilities, ReferenceIdentity, ReferenceMismatchError, ReferenceProvider
from trl_refplug.trainers.checkpoint import compare_with_checkpoint

from .. import tiny
from .runs import KINDS, build, train


LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


def resumed(kind, tmp_path, model, **kwargs):
    args = {**SAVING, **kwargs.pop("args", {})}
    whole = train(kind, tmp_path, model, args=args, **kwargs)
    trainer = build(kind, tmp_path, model, args=args, **kwargs)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    return whole, trainer


@pytest.mark.parametrize("provider", ["frozen", "adapter"])
@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_goes_on_as_if_never_stopped(kind, provider, tmp_path):
    whole, trainer = resumed(
        kind, tmp_path / "out", tiny.saved(tmp_path), args={"ref_provider": provider}, peft_config=LORA
    )
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == [entry["loss"] for entry in whole.logs if "loss" in entry]
    assert all(torch.equal(p, whole.weights[name]) for name, p in trainer.model.named_parameters())


def test_full_fine_tuning_and_the_last_checkpoint(tmp_path):
    path, out = tiny.saved(tmp_path), tmp_path / "out"
    whole = train("dpo", out, path, args=SAVING)
    trainer = build("dpo", out, path, args={**SAVING, "max_steps": 6})
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6
    assert whole.logs[0]["loss"] == trainer.state.log_history[0]["loss"]


@pytest.mark.parametrize("kind", KINDS)
def test_record(kind, tmp_path):
    path, out = tiny.saved(tmp_path), tmp_path / "out"
    trainer = train(kind, out, path, args={**SAVING, "ref_provider": "frozen"}).trainer
    record = json.loads((out / "checkpoint-2" / "refplug" / "reference.json").read_text())
    assert record["provider"] == "frozen"
    assert ReferenceIdentity.from_dict(record["identity"]) == trainer.ref_model.provider.identity()
    assert record["versions"]["trl"]
    assert not (out / "refplug").exists()


def test_another_reference_is_refused(tmp_path):
    path, out = tiny.saved(tmp_path), tmp_path / "out"
    train("dpo", out, path, args=SAVING)
    other = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1e-3
    trainer = build("dpo", out, other, args=SAVING)
    with pytest.raises(ReferenceMismatchError, match=r"checkpoint-2 was trained against the reference frozen\["):
        trainer.train(resume_from_checkpoint=str(out / "checkpoint-2"))
    # Passing the checkpoint itself as the policy is a usual mistake.
    trainer = build("dpo", out, str(out / "checkpoint-2"), args=SAVING)
    with pytest.raises(ReferenceMismatchError, match="not the checkpoint itself"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("provider", "details", "told"),
    [
        ("ema", {"alpha": 0.5, "sync_steps": 8}, "it had alpha=0.6, and has alpha=0.5 now. Pass the policy"),
        ("ema", {"alpha": 0.6, "sync_steps": 8}, "another model, revision, adapter or precision. Pass the policy"),
        ("frozen", {}, "another provider. Use --ref_provider ema, or start anew."),
    ],
)
def test_what_differs_is_named(provider, details, told, tmp_path):
    saved = ReferenceIdentity("ema", "1", {"alpha": 0.6, "sync_steps": 8})
    (tmp_path / "refplug").mkdir()
    (tmp_path / "refplug" / "reference.json").write_text(json.dumps({"identity": saved.to_dict()}))

    class Resumed(ReferenceProvider):
        def identity(self):
            return ReferenceIdentity(provider, "2", details)

        def log_probs(self, batch):
            raise AssertionError

    with pytest.raises(ReferenceMismatchError, match=re.escape(told)):
        compare_with_checkpoint(str(tmp_path), Resumed())


def test_the_same_reference_from_another_provider(tmp_path):
    """
    The identity is about numbers: the base of a LoRA policy and a frozen copy of that base are the same reference.
    """
    path, out = tiny.saved(tmp_path), tmp_path / "out"
    train("dpo", out, path, args={**SAVING, "ref_provider": "adapter"}, peft_config=LORA)
    trainer = build("dpo", out, path, args={**SAVING, "ref_provider": "frozen"}, peft_config=LORA)
    trainer.train(resume_from_checkpoint=str(out / "checkpoint-2"))


def test_damaged_record(tmp_path):
    path, out = tiny.saved(tmp_path), tmp_path / "out"
    train("dpo", out, path, args=SAVING)
    (out / "checkpoint-2" / "refplug" / "reference.json").write_text("{")
    trainer = build("dpo", out, path, args=SAVING)
    with pytest.raises(ReferenceMismatchError, match="damaged"):
        trainer.train(resume_from_checkpoint=str(out / "checkpoint-2"))


def test_checkpoint_of_trl_itself(tmp_path, caplog):
    path, out = tiny.saved(tmp_path), tmp_path / "out"
    train("dpo", out, path, ours=False, args=SAVING)
    trainer = build("dpo", out, path, args=SAVING)
    trainer.train(resume_from_checkpoint=str(out / "checkpoint-2"))
    assert "written without trl-refplug" in caplog.text


class Moving(ReferenceProvider):
    """A provider that counts steps, and keeps the count in checkpoints."""

    capabilities = Capabilities(moving=True, temperature=True)

    def __init__(self):
        super().__init__()
        self.steps = []
        self.complete_before = []

    def identity(self):
        return ReferenceIdentity("moving", "0")

    def log_probs(self, batch):
        return (batch.labels[:, 1:] != -100).float() * -3.0

    def on_step_end(self, step):
        self.steps.append(step)

    def metadata(self):
        return {"steps": len(self.steps)}

    def save_state(self, directory: Path):
        # The file trainer_state.json makes a checkpoint complete, so the reference must have been written before it.
        self.complete_before.append((directory.parent.parent / "trainer_state.json").exists())
        (directory / "steps").write_text(json.dumps(self.steps))

    def load_state(self, directory: Path):
        self.steps = json.loads((directory / "steps").read_text())


class TestState:
    @pytest.mark.parametrize("kind", KINDS)
    def test_round_trip(self, kind, tmp_path):
        out, path = tmp_path / "out", tiny.saved(tmp_path)
        provider = Moving()
        train(kind, out, path, args=SAVING, reference=provider)
        # `build` copies its arguments, so the count is read from the checkpoint that the provider wrote.
        record = json.loads((out / "checkpoint-4" / "refplug" / "reference.json").read_text())
        assert record["metadata"] == {"steps": 4}
        shutil.rmtree(out / "checkpoint-4")
        trainer = build(kind, out, path, args={**SAVING, "max_steps": 6}, reference=Moving())
        trainer.train(resume_from_checkpoint=str(out / "checkpoint-2"))
        assert trainer.ref_model.provider.steps == [1, 2, 3, 4, 5, 6]
        assert trainer.ref_model.provider.complete_before == [False, False]

    def test_missing(self, tmp_path):
        out, path = tmp_path / "out", tiny.saved(tmp_path)
        train("dpo", out, path, ours=False, args=SAVING)
        trainer = build("dpo", out, path, args=SAVING, reference=Moving())
        with pytest.raises(ReferenceMismatchError, match="no reference state"):
            trainer.train(resume_from_checkpoint=str(out / "checkpoint-2"))


def test_the_check_is_not_skipped_because_a_flag_is_set(tmp_path):
    """`resume_from_checkpoint` in the arguments resumes nothing; only `train(resume_from_checkpoint=...)` does."""
    args = {"resume_from_checkpoint": str(tmp_path / "checkpoint-2")}
    trainer = build("dpo", tmp_path, tiny.saved(tmp_path), args=args)
    with torch.no_grad():
        trainer.ref_model.provider.module.get_parameter("model.embed_tokens.weight").add_(0.5)
    with pytest.raises(ReferenceMismatchError, match="not the one that was declared: as training began"):
        trainer.train()
