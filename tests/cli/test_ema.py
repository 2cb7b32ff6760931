"""`trl-refplug ema export`, which writes the reference of a checkpoint as an ordinary model or adapter."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import tiny
from tests.cli.processes import run_here
from tests.trainers.runs import build, train
from tests.trainers.test_adapter import tokens


EMA = {
    "ref_provider": "ema",
    "ref_provider_kwargs": {"alpha": 0.4, "sync_steps": 1},
    "save_strategy": "steps",
    "save_steps": 3,
}


def log_probs(model, batch):
    with torch.no_grad():
        logits = model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
    labels = batch["labels"][:, 1:]
    chosen = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return chosen.masked_fill(labels == -100, 0)


@pytest.mark.parametrize(
    ("architecture", "dtype", "overrides"),
    [
        ("llama", "float32", {}),
        ("llama", "bfloat16", {"tie_word_embeddings": True}),
        ("gpt2", "float32", {}),
        ("mixtral", "float32", {}),
    ],
)
def test_model(architecture, dtype, overrides, tmp_path):
    path = tiny.saved(tmp_path, architecture, **overrides)
    args = {**EMA, "model_init_kwargs": {"dtype": dtype}}
    trainer = train("dpo", tmp_path / "out", path, args=args).trainer
    out = tmp_path / "exported"
    completed = run_here("ema", "export", str(tmp_path / "out" / "checkpoint-3"), str(out))
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.replace("\n", "") == f"Wrote the reference, a model, to {out}."
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == getattr(torch, dtype)
    batch = tokens(trainer)
    expected = trainer.ref_model(**batch).log_probs
    torch.testing.assert_close(log_probs(model, batch), expected, atol=1e-5 if dtype == "float32" else 0.1, rtol=0)
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-3", dtype="auto")
    assert not torch.allclose(log_probs(policy, batch), expected, atol=0.2)
    assert len(AutoTokenizer.from_pretrained(out)) == len(tiny.tokenizer())
    assert not (out / "refplug").exists()
    # It can be used as a reference like any other model.
    args = {"ref_provider": "frozen", "ref_provider_kwargs": {"model": str(out)}}
    build("dpo", tmp_path, path, args=args)


def test_adapter(tmp_path):
    path = tiny.saved(tmp_path)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = train("dpo", tmp_path / "out", path, args=EMA, peft_config=config).trainer
    out = tmp_path / "exported"
    completed = run_here("ema", "export", str(tmp_path / "out" / "checkpoint-3"), str(out))
    assert completed.returncode == 0, completed.stderr
    assert "an adapter" in completed.stdout
    batch = tokens(trainer)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), out)
    expected = trainer.ref_model(**batch).log_probs
    torch.testing.assert_close(log_probs(model, batch), expected, atol=1e-4, rtol=0)
    merged = model.merge_and_unload()
    torch.testing.assert_close(log_probs(merged, batch), expected, atol=1e-3, rtol=0)


def test_without_a_moving_reference(tmp_path):
    train("dpo", tmp_path / "out", tiny.saved(tmp_path), args={"save_strategy": "steps", "save_steps": 3})
    completed = run_here("ema", "export", str(tmp_path / "out" / "checkpoint-3"), str(tmp_path / "exported"))
    assert completed.returncode == 2
    assert "no state of a moving reference" in completed.stderr
    assert not (tmp_path / "exported").exists()


def test_directory_in_use(tmp_path):
    train("dpo", tmp_path / "out", tiny.saved(tmp_path), args=EMA)
    (used := tmp_path / "used").mkdir()
    (used / "mine.txt").write_text("keep")
    completed = run_here("ema", "export", str(tmp_path / "out" / "checkpoint-3"), str(used))
    assert completed.returncode == 2
    assert "Name a new directory" in completed.stderr.replace("\n", " ")
    assert [p.name for p in Path(used).iterdir()] == ["mine.txt"]


def test_help():
    completed = run_here("ema", "--help")
    assert completed.returncode == 0
    assert "export" in completed.stdout
