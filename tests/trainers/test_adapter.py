"""`adapter`: the policy is its own reference. The reference does not drift, and asking for it has no side effects."""

import copy
import math

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from trl_refplug import ConfigurationError, ImpureReferenceError
from trl_refplug.models.adapter_purity import rewritten_tensors
from trl_refplug.models.identity import digest_tensors, tensor_dtypes

from .. import tiny
from .runs import KINDS, ONLINE, assert_same, build, train


def lora(**overrides):
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **overrides})


def adapted(path, config=None, name="default", std=0.1):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(path), config or lora(), adapter_name=name)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def adapter_args(**options):
    return {"ref_provider": "adapter", "ref_provider_kwargs": options, "disable_dropout": True}


def first_loss(run):
    return run.logs[0]["loss"]


class TestPurity:
    """A policy with which the reference would drift, or be another distribution, is refused with a remedy."""

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("bias", ["all", "lora_only"])
    def test_bias(self, kind, bias, tmp_path):
        with pytest.raises(ImpureReferenceError, match="bias='none'"):
            build(kind, tmp_path, tiny.saved(tmp_path), args=adapter_args(), peft_config=lora(bias=bias))

    def test_bias_of_a_pretrained_adapter(self, tmp_path):
        model = adapted(tiny.saved(tmp_path), lora(bias="all"))
        with pytest.raises(ImpureReferenceError, match="bias='none'"):
            build("grpo", tmp_path, model, args=adapter_args())

    @pytest.mark.parametrize("kind", KINDS)
    def test_trainable_base_weights(self, kind, tmp_path):
        model = adapted(tiny.saved(tmp_path))
        model.get_base_model().model.norm.weight.requires_grad_(True)
        with pytest.raises(ImpureReferenceError, match=r"model\.norm\.weight"):
            build(kind, tmp_path, model, args=adapter_args())

    @pytest.mark.parametrize("kind", KINDS)
    def test_nothing_trainable(self, kind, tmp_path):
        model = adapted(tiny.saved(tmp_path))
        model.requires_grad_(False)
        with pytest.raises(ImpureReferenceError, match="is_trainable=True"):
            build(kind, tmp_path, model, args=adapter_args())

    @pytest.mark.parametrize("init", ["pissa", "olora"])
    def test_rewritten_base(self, init, tmp_path):
        path = tiny.saved(tmp_path)
        peft_config = lora(init_lora_weights=init)
        with pytest.raises(ImpureReferenceError, match=f"init_lora_weights='{init}'"):
            build("dpo", tmp_path, path, args=adapter_args(), peft_config=peft_config)
        # If they are declared, each of them is a reference of its own.
        start = train("dpo", tmp_path, path, args=adapter_args(start="adapter"), peft_config=peft_config)
        assert first_loss(start) == pytest.approx(math.log(2), abs=1e-6)
        base = train("dpo", tmp_path, path, args=adapter_args(start="base"), peft_config=peft_config)
        assert abs(first_loss(base) - math.log(2)) > 1e-4
        frozen = train("dpo", tmp_path, path, args={"ref_provider": "frozen"}, peft_config=peft_config)
        assert first_loss(frozen) == pytest.approx(math.log(2), abs=1e-4)

    def test_a_cast_is_no_rewrite(self, tmp_path):
        """GRPO may cast the LM head in place, which does not change its values. Any other change of it is noticed."""
        policy = AutoModelForCausalLM.from_pretrained(tiny.saved(tmp_path), dtype=torch.bfloat16)
        before, dtypes = digest_tensors(policy), tensor_dtypes(policy)
        args = {**adapter_args(), "cast_lm_head_to_fp32": True}
        trainer = build("grpo", tmp_path, policy, args=args, peft_config=lora(target_modules=["q_proj"]))
        head = trainer.model.get_base_model().lm_head.weight
        assert head.dtype == torch.float32
        assert rewritten_tensors(before, trainer.model, dtypes) == []
        with torch.no_grad():
            head.mul_(1.1)
        assert rewritten_tensors(before, trainer.model, dtypes) == ["lm_head.weight"]

    def test_all_problems_at_once(self, tmp_path):
        model = adapted(tiny.saved(tmp_path), lora(bias="all"))
        model.get_base_model().model.norm.weight.requires_grad_(True)
        with pytest.raises(ImpureReferenceError, match=r"bias=.*Also: .*model\.norm\.weight"):
            build("rloo", tmp_path, model, args=adapter_args())


class TestKindsOfAdapter:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        "peft_config",
        [
            lora(use_dora=True),
            lora(use_rslora=True, r=8),
            lora(modules_to_save=["embed_tokens"]),
            lora(target_modules=["q_proj"], modules_to_save=["norm"]),
            lora(target_modules=["q_proj", "embed_tokens"]),
            lora(target_modules=["q_proj"], trainable_token_indices=[5, 6]),
            lora(init_lora_weights="gaussian"),
        ],
        ids=["dora", "rslora", "embed_to_save", "norm_to_save", "lora_embedding", "token_indices", "gaussian"],
    )
    def test_starts_at_zero_and_equals_trl(self, kind, peft_config, tmp_path):
        path = tiny.saved(tmp_path)
        ours = train(kind, tmp_path, path, args=adapter_args(), peft_config=peft_config)
        theirs = train(kind, tmp_path, path, ours=False, args={"disable_dropout": True}, peft_config=peft_config)
        assert_same(ours, theirs)
        if kind == "dpo":
            assert first_loss(ours) == pytest.approx(math.log(2), abs=1e-5)

    def test_reference_stays_while_saved_modules_train(self, tmp_path):
        """In the last step the reference is still the base model, although `modules_to_save` have moved far."""
        path = tiny.saved(tmp_path)
        trainer = build("dpo", tmp_path, path, args=adapter_args(), peft_config=lora(modules_to_save=["embed_tokens"]))
        batch = tokens(trainer)
        before = trainer.ref_model(**batch).log_probs
        trainer.train()
        assert torch.equal(trainer.ref_model(**batch).log_probs, before)

    def test_ia3(self, tmp_path):
        peft_config = IA3Config(
            target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
        )
        path = tiny.saved(tmp_path)
        ours = train("dpo", tmp_path, path, args=adapter_args(), peft_config=peft_config)
        assert_same(ours, train("dpo", tmp_path, path, ours=False, peft_config=peft_config))

    def test_adapter_that_starts_away_from_the_base(self, tmp_path, caplog):
        """With a random B, policy and reference rightly differ at the start, so there is nothing to compare with."""
        run = train(
            "dpo", tmp_path, tiny.saved(tmp_path), args=adapter_args(), peft_config=lora(init_lora_weights=False)
        )
        assert abs(first_loss(run) - math.log(2)) > 1e-3
        assert "ref_check skipped" in caplog.text


class TestNamedAdapter:
    def policy(self, tmp_path):
        model = adapted(tiny.saved(tmp_path), name="mine")
        model.add_adapter("anchor", lora())
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B.anchor" in key:
                    parameter.normal_(std=0.1, generator=generator)
        return model

    @pytest.mark.parametrize("kind", KINDS)
    def test_is_the_reference(self, kind, tmp_path):
        model = self.policy(tmp_path)
        policy = copy.deepcopy(model)
        anchor = {k: v.clone() for k, v in model.state_dict().items() if ".anchor." in k}
        ours = train(kind, tmp_path, policy, args=adapter_args(adapter="anchor"))
        assert set(ours.trainer.model.peft_config) == {"mine", "anchor"}
        after = ours.trainer.model.state_dict()
        assert anchor
        assert all(torch.equal(after[name], value) for name, value in anchor.items())
        # The numbers are those of a second model: the base with that adapter merged into it.
        model.set_adapter("anchor")
        args = {"disable_dropout": True}
        theirs = train(kind, tmp_path, policy, ref_model=model.merge_and_unload(), args=args)
        key = "kl" if kind in ONLINE else "loss"
        assert ours.logs[0][key] == pytest.approx(theirs.logs[0][key], abs=1e-4)

    def test_unknown(self, tmp_path):
        with pytest.raises(ConfigurationError, match="Did you mean 'anchor'"):
            build("dpo", tmp_path, self.policy(tmp_path), args=adapter_args(adapter="ancor"))

    def test_the_trained_one(self, tmp_path):
        with pytest.raises(ConfigurationError, match="being trained"):
            build("dpo", tmp_path, self.policy(tmp_path), args=adapter_args(adapter="mine"))

    def test_with_start(self, tmp_path):
        with pytest.raises(ConfigurationError, match="Keep one"):
            build("dpo", tmp_path, self.policy(tmp_path), args=adapter_args(adapter="anchor", start="base"))

    def test_called_ref(self, tmp_path):
        model = adapted(tiny.saved(tmp_path))
        model.add_adapter("ref", lora())
        with pytest.raises(ConfigurationError, match="adapter_name="):
            build("dpo", tmp_path, model, args=adapter_args(adapter="ref"))


class TestNoSideEffects:
    @pytest.mark.parametrize("start", ["base", "adapter"])
    def test_flags_modes_adapter_rng_and_batch(self, start, tmp_path):
        model = adapted(tiny.saved(tmp_path, attention_dropout=0.2), lora(lora_dropout=0.3))
        trainer = build("grpo", tmp_path, model, args={**adapter_args(start=start), "disable_dropout": False})
        policy = trainer.model
        policy.train()
        policy.get_base_model().model.norm.eval()  # one module is in another mode than the others
        batch = tokens(trainer)
        kept = {name: value.clone() for name, value in batch.items() if isinstance(value, torch.Tensor)}
        flags = {name: p.requires_grad for name, p in policy.named_parameters()}
        modes = {name: m.training for name, m in policy.named_modules()}
        rng = torch.get_rng_state()

        first = trainer.ref_model(**batch).log_probs
        second = trainer.ref_model(**batch).log_probs

        assert torch.equal(first, second)  # no dropout, although the policy is in train mode
        assert not first.requires_grad
        assert {name: p.requires_grad for name, p in policy.named_parameters()} == flags
        assert {name: m.training for name, m in policy.named_modules()} == modes
        assert policy.active_adapter == "default"
        assert policy.get_model_status().enabled is True
        assert torch.equal(torch.get_rng_state(), rng)
        assert all(torch.equal(batch[name], value) for name, value in kept.items())

    def test_after_an_error_too(self, tmp_path):
        trainer = build("dpo", tmp_path, adapted(tiny.saved(tmp_path)), args=adapter_args())
        flags = {name: p.requires_grad for name, p in trainer.model.named_parameters()}
        hook = trainer.model.get_input_embeddings().register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.ref_model(**tokens(trainer))
        hook.remove()
        assert {name: p.requires_grad for name, p in trainer.model.named_parameters()} == flags
        assert trainer.model.active_adapter == "default"

    def test_warns_where_the_policy_keeps_its_dropout(self, tmp_path, caplog):
        path = tiny.saved(tmp_path, attention_dropout=0.2)
        build("grpo", tmp_path, path, args={"ref_provider": "adapter"}, peft_config=lora())
        assert "disable_dropout=True" in caplog.text


def test_needs_a_peft_policy(tmp_path):
    with pytest.raises(ConfigurationError, match="peft_config"):
        build("dpo", tmp_path, tiny.saved(tmp_path), args=adapter_args())


@pytest.mark.parametrize("kind", ONLINE)
def test_start_base_of_a_pretrained_adapter(kind, tmp_path):
    model = adapted(tiny.saved(tmp_path))
    run = train(kind, tmp_path, model, args=adapter_args(start="base"))
    assert run.logs[0]["kl"] > 1e-3
    assert "ref" not in run.trainer.model.peft_config


def tokens(trainer):
    """The arguments that TRL would pass to its reference model."""
    texts = ["the cat sat on a warm mat", "two plus three is five"]
    batch = tiny.tokenizer()(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :2] = -100
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "labels": labels,
        "fused_lm_head": True,
    }
