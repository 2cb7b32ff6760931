"""A moving reference goes on where it was when a run is resumed, killed, or set back to its best checkpoint."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file

from trl_refplug import ReferenceMismatchError

from .. import tiny
from .runs import KINDS, ONLINE, build, train


ROOT = Path(__file__).parents[2]
EMA = {
    "ref_provider": "ema",
    "ref_provider_kwargs": {"alpha": 0.4, "sync_steps": 3},
    "max_steps": 8,
    "save_strategy": "steps",
    "save_steps": 1,
}


def losses(trainer):
    return [
        (entry["step"], entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry
    ]


def references(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.ref_model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resumed_before_at_and_after_a_sync(kind, dtype, tmp_path):
    path, out = tiny.saved(tmp_path), tmp_path / "out"
    args = {**EMA, "bf16": dtype == "bfloat16", "model_init_kwargs": {"dtype": dtype}}
    # Beyond its first epoch TRL's GRPO and RLOO resume with other prompts, whatever the reference: their sampler's
    # random state is in no checkpoint.
    data = {"train_dataset": tiny.prompt_data(16)} if kind in ONLINE else {}
    whole = train(kind, out, path, args=args, **data).trainer
    assert whole.ref_model.provider.metadata()["syncs"] == 2
    for step in (2, 3, 4, 6):
        trainer = build(kind, tmp_path / "again", path, args={**args, "save_strategy": "no"}, **data)
        trainer.train(resume_from_checkpoint=str(out / f"checkpoint-{step}"))
        assert losses(trainer) == losses(whole)
        assert trainer.ref_model.provider.metadata()["syncs"] == 2
        expected = references(whole)
        assert all(torch.equal(parameter, expected[name]) for name, parameter in references(trainer).items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("average", "overrides"),
    [("exact", {}), ("exact", {"use_dora": True}), ("factors", {"modules_to_save": ["norm"]})],
)
def test_resumed_with_an_adapter(kind, average, overrides, tmp_path):
    path, out = tiny.saved(tmp_path), tmp_path / "out"
    schedule = {**EMA["ref_provider_kwargs"], "average": average}
    args = {**EMA, "ref_provider_kwargs": schedule}
    given = {"train_dataset": tiny.prompt_data(16)} if kind in ONLINE else {}
    given["peft_config"] = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **overrides)
    whole = train(kind, out, path, args=args, **given).trainer
    for step in (2, 3, 4):
        trainer = build(kind, tmp_path / "again", path, args={**args, "save_strategy": "no"}, **given)
        trainer.train(resume_from_checkpoint=str(out / f"checkpoint-{step}"))
        assert losses(trainer) == losses(whole)
        expected = dict(whole.model.named_parameters())
        assert all(torch.equal(p, expected[name]) for name, p in trainer.model.named_parameters())
        assert sum(".ref." in name for name in expected) > 10


def test_without_the_state_it_would_be_another_run(tmp_path, monkeypatch):
    """The tests above would fail if the state were not loaded: the reference plays a part."""
    path, out = tiny.saved(tmp_path), tmp_path / "out"
    whole = train("dpo", out, path, args=EMA).trainer
    trainer = build("dpo", tmp_path / "again", path, args={**EMA, "save_strategy": "no"})
    monkeypatch.setattr(trainer.ref_model.provider, "load_state", lambda directory: None)
    trainer.train(resume_from_checkpoint=str(out / "checkpoint-4"))
    assert losses(trainer) != losses(whole)


@pytest.mark.parametrize("lora", [None, {"r": 4, "target_modules": "all-linear"}], ids=["full", "lora"])
def test_killed(lora, tmp_path):
    """A process dies between two checkpoints, and another one goes on from the first of them."""
    path, out = tiny.saved(tmp_path), tmp_path / "out"
    job = json.dumps({"model": path, "lora": lora, "args": {**EMA, "save_steps": 2}})
    command = [sys.executable, "-m", "tests.trainers.one_run", job]
    whole = subprocess.run([*command, str(tmp_path / "whole"), "0"], cwd=ROOT, capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr[-3000:]
    killed = subprocess.run([*command, str(out), "5"], cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL
    assert {p.name for p in out.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    resumed = subprocess.run([*command, str(out), "0"], cwd=ROOT, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    result = json.loads((out / "result.json").read_text())
    assert result == json.loads((tmp_path / "whole" / "result.json").read_text())
    assert result["syncs"] == 2


class TestRefused:
    def test_another_schedule(self, tmp_path):
        path, out = tiny.saved(tmp_path), tmp_path / "out"
        train("dpo", out, path, args={**EMA, "max_steps": 2})
        other = {**EMA, "ref_provider_kwargs": {"alpha": 0.5, "sync_steps": 3}}
        trainer = build("dpo", tmp_path, path, args=other)
        with pytest.raises(ReferenceMismatchError, match=r"alpha=0\.4.*alpha=0\.5"):
            trainer.train(resume_from_checkpoint=str(out / "checkpoint-2"))

    def test_checkpoint_of_trl(self, tmp_path):
        path, out = tiny.saved(tmp_path), tmp_path / "out"
        args = {"sync_ref_model": True, "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
        train("dpo", out, path, ours=False, args=args)
        trainer = build("dpo", tmp_path, path, args={**args, "max_steps": 4})
        with pytest.raises(ReferenceMismatchError, match=r"no reference state.*Start anew"):
            trainer.train(resume_from_checkpoint=str(out / "checkpoint-2"))

    @pytest.mark.parametrize("lost", ["ema.json", "reference-00000-00000.safetensors"])
    def test_lost_file(self, lost, tmp_path):
        path, out = tiny.saved(tmp_path), tmp_path / "out"
        train("dpo", out, path, args={**EMA, "max_steps": 2})
        (out / "checkpoint-2" / "refplug" / "state" / lost).unlink()
        trainer = build("dpo", tmp_path, path, args=EMA)
        with pytest.raises(ReferenceMismatchError, match=r"checkpoint-2.*(damaged|start anew)"):
            trainer.train(resume_from_checkpoint=str(out / "checkpoint-2"))


@pytest.mark.parametrize("lora", [False, True])
def test_what_an_earlier_run_left_there_is_no_part_of_it(lora, tmp_path):
    """That run had more ranks, and the parts of their files would be read as parts of this run."""
    path, out = tiny.saved(tmp_path), tmp_path / "out"
    state = out / "checkpoint-4" / "refplug" / "state"
    state.mkdir(parents=True)
    stale = state / "reference-00003-00000.safetensors"
    save_file({"lm_head.weight": torch.zeros(3)}, stale)
    peft_config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    whole = train("dpo", out, path, args=EMA, peft_config=peft_config).trainer
    assert not stale.exists()
    trainer = build("dpo", tmp_path / "again", path, args={**EMA, "save_strategy": "no"}, peft_config=peft_config)
    trainer.train(resume_from_checkpoint=str(out / "checkpoint-4"))
    assert losses(trainer) == losses(whole)


def test_state_is_there_before_the_checkpoint_is_complete(tmp_path):
    path, out = tiny.saved(tmp_path), tmp_path / "out"
    train("dpo", out, path, args={**EMA, "max_steps": 1})
    checkpoint = out / "checkpoint-1"
    complete = (checkpoint / "trainer_state.json").stat().st_mtime_ns
    state = list((checkpoint / "refplug").rglob("*.*"))
    assert {path.suffix for path in state} == {".json", ".safetensors"}
    assert all(path.stat().st_mtime_ns <= complete for path in state)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_best_model_comes_with_its_reference(kind, lora, tmp_path):
    path, out = tiny.saved(tmp_path), tmp_path / "out"
    data = {"dpo": tiny.preference_data, "kto": tiny.unpaired_data}[kind]()
    args = {
        **EMA,
        "ref_provider_kwargs": {"alpha": 0.4, "sync_steps": 2},
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "learning_rate": 0.1,
    }
    given = {"peft_config": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")} if lora else {}
    trainer = train(kind, out, path, args=args, eval_dataset=data, **given).trainer
    best = int(Path(trainer.state.best_model_checkpoint).name.split("-")[1])
    assert best < 8
    provider = trainer.ref_model.provider
    assert provider.metadata()["syncs"] == best // 2
    evaluated = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert trainer.evaluate()["eval_loss"] == evaluated[best]


def test_rotation_leaves_nothing_behind(tmp_path):
    path, out = tiny.saved(tmp_path), tmp_path / "out"
    train("dpo", out, path, args={**EMA, "save_total_limit": 1})
    assert [p.name for p in out.iterdir() if p.is_dir()] == ["checkpoint-8"]
    # A user loads the policy alone from it.
    shutil.rmtree(out / "checkpoint-8" / "refplug")
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(out / "checkpoint-8")
