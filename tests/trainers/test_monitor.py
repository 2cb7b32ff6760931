"""`ref_monitor_steps`: the policy's distance from the declared reference, and a run that does not notice."""

import copy
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import DPOTrainer

from trl_refplug import ConfigurationError, SeamError, plug
from trl_refplug.trainers.monitor import drift
from trl_refplug.trainers.requested_batches import completions_at_hand

from .. import tiny
from .runs import KINDS, ONLINE, TRL, assert_same, build, config, finished, train
from .test_trl_patch import Uniform


MEASURED = ("ref/kl", "ref/kl_k3", "ref/kl_p99", "ref/kl_max")


def measured(trainer):
    """Of every logged step, what was measured."""
    steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return [{name: entry[name] for name in MEASURED if name in entry} for entry in steps]


class TestTrainingDoesNotChange:
    @pytest.mark.parametrize("kind", KINDS)
    def test_with_dropout(self, kind, tmp_path):
        args = {"gradient_accumulation_steps": 2, "disable_dropout": False}
        model = tiny.saved(tmp_path, "gpt2", resid_pdrop=0.1)  # random numbers are drawn in every step
        theirs = train(kind, tmp_path / "trl", model, ours=False, args=args)
        ours = train(kind, tmp_path / "ours", model, args={**args, "ref_monitor_steps": 1})
        assert_same(ours, theirs)
        assert all(len(entry) == 4 for entry in measured(ours.trainer))

    @pytest.mark.parametrize("args", [{}, {"bf16": True, "gradient_checkpointing": True}], ids=["float32", "bf16"])
    @pytest.mark.parametrize("kind", ONLINE)
    def test_beside_a_reference_that_the_trainer_asks(self, kind, args, tmp_path):
        model = tiny.saved(tmp_path)
        theirs = train(kind, tmp_path / "trl", model, ours=False, args=args)
        ours = train(kind, tmp_path / "ours", model, args={**args, "ref_monitor_steps": 1})
        assert_same(ours, theirs)
        assert ours.trainer.ref_model.calls == 3  # the trainer's own questions

    @pytest.mark.parametrize("kind", ONLINE)
    @pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
    def test_without_one(self, kind, lora, tmp_path):
        args = {"beta": 0.0, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
        kwargs = {"eval_dataset": tiny.prompt_data(4)}
        if lora:
            kwargs["peft_config"] = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        theirs = train(kind, tmp_path / "trl", tiny.saved(tmp_path), ours=False, args=args, **kwargs)
        args |= {"ref_monitor_steps": 1}
        ours = train(kind, tmp_path / "ours", tiny.saved(tmp_path), args=args, **kwargs)
        assert_same(ours, theirs)
        assert ours.trainer.ref_model is None
        first, *others = measured(ours.trainer)
        assert first["ref/kl_max"] == pytest.approx(0.0, abs=1e-6)  # it starts as its reference
        assert all(entry["ref/kl_k3"] > 1e-6 for entry in others)

    def test_it_goes_on_where_no_reference_was(self, tmp_path):
        args = {"beta": 0.0, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
        train("grpo", tmp_path, tiny.saved(tmp_path), args=args)
        trainer = build("grpo", tmp_path, tiny.saved(tmp_path), args={**args, "ref_monitor_steps": 1})
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert all(entry["ref/kl_k3"] > 1e-6 for entry in measured(trainer)[2:])


def by_logits(model, batch, temperature):
    """Log-probs of all tokens, in the plainest way."""
    with torch.no_grad():
        logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits.double()[:, :-1] / temperature
    targets = batch.labels[:, 1:].clamp(min=0).unsqueeze(-1)
    return logits.log_softmax(-1).gather(-1, targets).squeeze(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_brute_force(kind, tmp_path):
    seen = {}

    class Remembers(TRL[kind]):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if self.state.global_step not in seen:  # the first batch of the step
                state, batch = self.model.state_dict(), completions_at_hand(inputs)
                seen[self.state.global_step] = copy.deepcopy(state), copy.deepcopy(batch)
            return super().compute_loss(model, inputs, *args, **kwargs)

    path = tiny.saved(tmp_path)
    args = {"ref_monitor_steps": 2, "gradient_accumulation_steps": 2, "max_steps": 4}
    trainer = build(kind, tmp_path, path, cls=plug(Remembers), args=args)
    trainer.train()
    reference, policy = (AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval() for _ in range(2))
    temperature = 0.7 if kind in ONLINE else 1.0
    found = measured(trainer)
    assert [len(entry) for entry in found] == [0, 4, 0, 4]
    for step in (1, 3):
        state, batch = seen[step]
        policy.load_state_dict(state)
        ours, refs = by_logits(policy, batch, temperature), by_logits(reference, batch, temperature)
        k1 = [
            (ours[row, at] - refs[row, at]).item()
            for row in range(len(batch.labels))
            for at in range(batch.labels.shape[1] - 1)
            if batch.labels[row, at + 1] != -100
        ]
        assert found[step] == pytest.approx(
            {
                "ref/kl": sum(k1) / len(k1),
                "ref/kl_k3": sum(math.exp(-x) - 1 + x for x in k1) / len(k1),
                "ref/kl_p99": np.quantile(k1, 0.99),
                "ref/kl_max": max(k1),
            },
            abs=1e-5,
        )


def test_what_the_estimators_are():
    policy, reference = torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[-1.5, -1.0, 0.0]])
    found = drift(policy, reference, torch.tensor([[True, True, False]]))
    assert found["kl"] == pytest.approx((0.5 - 1.0) / 2)
    assert found["kl_max"] == pytest.approx(0.5)
    assert found["kl_k3"] == pytest.approx((math.exp(-0.5) - 1 + 0.5 + math.exp(1.0) - 1 - 1.0) / 2)
    assert drift(policy, reference, torch.zeros(1, 3, dtype=torch.bool)) == {}


def test_what_a_tool_said_does_not_count():
    ones = torch.ones(1, 2, dtype=torch.long)
    inputs = {"prompt_ids": 5 * ones, "prompt_mask": ones, "completion_ids": torch.tensor([[6, 7, 8]])}
    inputs |= {"completion_mask": torch.tensor([[1, 1, 1]]), "tool_mask": torch.tensor([[1, 0, 1]])}
    assert completions_at_hand(inputs).labels.tolist() == [[-100, -100, 6, -100, 8]]


def test_a_reference_that_moves(tmp_path):
    args = {"ref_provider": "ema", "ref_provider_kwargs": {"sync_steps": 1, "alpha": 1.0}, "ref_monitor_steps": 1}
    run = train("dpo", tmp_path, tiny.saved(tmp_path), args=args)
    assert [entry["ref/kl_max"] for entry in measured(run.trainer)] == pytest.approx([0.0] * 3, abs=1e-5)


def test_its_questions_are_not_the_trainers(tmp_path):
    class Deaf(DPOTrainer):
        def _compute_loss(self, model, inputs, return_outputs):
            return model(inputs["input_ids"], labels=inputs["input_ids"], fused_lm_head=True).loss

    with pytest.raises(SeamError, match="never asked"):
        train("dpo", tmp_path, tiny.saved(tmp_path), cls=plug(Deaf), args={"ref_monitor_steps": 1})


def test_any_provider(tmp_path):
    run = train(
        "grpo", tmp_path, tiny.saved(tmp_path), reference=Uniform(), args={"beta": 0.0, "ref_monitor_steps": 1}
    )
    assert all(entry["ref/kl_k3"] > 0.1 for entry in measured(run.trainer))
    assert "kl" not in finished(run.trainer).logs[0]


def test_a_number_of_steps(tmp_path):
    for wrong in (-1, 0.5):
        with pytest.raises(ConfigurationError, match="`ref_monitor_steps` must be a number of optimizer steps"):
            config("dpo", tmp_path, ref_monitor_steps=wrong)
