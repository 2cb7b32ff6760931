"""`ema` works with a LoRA policy in all four trainers, and the second adapter is in nothing that is saved."""

import copy
import itertools
import math

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from trl_refplug import ConfigurationError, ImpureReferenceError

from .. import tiny
from .runs import KINDS, ONLINE, assert_same, build, finished, train
from .test_adapter import adapted, lora, tokens
from .test_ema import SYNCING, ema, logged


MODES = ["exact", "factors"]


def policy_weights(run):
    return {name: weight for name, weight in run.weights.items() if ".ref." not in name}


@pytest.mark.parametrize("kind", KINDS)
class TestTraining:
    def test_flags_of_trl(self, kind, tmp_path):
        """TRL raises here."""
        run = train(kind, tmp_path, tiny.saved(tmp_path), args=SYNCING, peft_config=lora())
        assert type(run.trainer.ref_model.provider).__name__ == "EmaProvider"
        assert logged(run, "ref/syncs") == [0, 1, 1, 2, 2]
        assert [distance > 0 for distance in logged(run, "ref/distance")] == [True] * 5
        assert run.logs[0]["kl" if kind in ONLINE else "loss"] == pytest.approx(
            0 if kind in ONLINE else run.logs[0]["loss"], abs=1e-6
        )

    @pytest.mark.parametrize("average", MODES)
    def test_alpha_zero_is_frozen(self, kind, average, tmp_path):
        path = tiny.saved(tmp_path)
        still = train(kind, tmp_path, path, args=ema(alpha=0, sync_steps=1, average=average), peft_config=lora())
        frozen = train(kind, tmp_path, path, args={"ref_provider": "frozen", "max_steps": 5}, peft_config=lora())
        still.weights = policy_weights(still)
        assert_same(still, frozen)

    @pytest.mark.parametrize("average", MODES)
    def test_a_policy_with_an_adapter_of_its_own(self, kind, average, tmp_path):
        """TRL gives such a policy a reference adapter too, which has the wrong rank."""
        model = adapted(tiny.saved(tmp_path), name="mine")
        run = train(kind, tmp_path, model, args=ema(alpha=0.5, average=average))
        assert set(run.trainer.model.peft_config) == {"mine", "ref"}
        assert run.trainer.model.active_adapter == "mine"
        first = run.logs[0]
        assert first["kl"] == pytest.approx(0, abs=1e-5) if kind in ONLINE else math.isfinite(first["loss"])
        trainable = {name for name, p in run.trainer.model.named_parameters() if p.requires_grad}
        assert trainable
        assert all(".mine." in name for name in trainable)

    def test_the_reference_moves_and_only_by_syncs(self, kind, tmp_path):
        trainer = build(kind, tmp_path, tiny.saved(tmp_path), args=ema(sync_steps=2), peft_config=lora())
        batch, seen = tokens(trainer), []
        moves = trainer.ref_model.provider.on_step_end

        def remember(step):
            moves(step)
            seen.append(trainer.ref_model(**batch).log_probs)

        trainer.ref_model.provider.on_step_end = remember
        trainer.train()
        same = [torch.equal(one, other) for one, other in itertools.pairwise(seen)]
        assert same == [False, True, False, True]


@pytest.mark.parametrize("kind", ["dpo", "kto"])
@pytest.mark.parametrize("average", MODES)
@pytest.mark.parametrize("overrides", [{}, {"use_dora": True}, {"modules_to_save": ["embed_tokens"]}], ids=str)
def test_alpha_one_every_step_has_no_log_ratio(kind, average, overrides, tmp_path):
    args = ema(alpha=1, sync_steps=1, average=average)
    run = train(kind, tmp_path, tiny.saved(tmp_path), args=args, peft_config=lora(**overrides))
    assert len(run.logs) == 5
    # float32 sums over about ten tokens, of products whose scaling is applied at another place
    tolerance = 1e-4 if average == "exact" or overrides else 0
    for entry in run.logs:
        assert entry["rewards/chosen"] == pytest.approx(0, abs=tolerance)
        assert entry["rewards/rejected"] == pytest.approx(0, abs=tolerance)


def test_equals_full_fine_tuning_of_the_same_weights(tmp_path):
    """The log-probs are those of a reference that is a full model with the average of the merged policies."""
    path = tiny.saved(tmp_path)
    alpha = 0.4
    trainer = build("dpo", tmp_path, path, args=ema(alpha=alpha, sync_steps=1), peft_config=lora(use_rslora=True))
    reference = {n: w.double() for n, w in AutoModelForCausalLM.from_pretrained(path).state_dict().items()}
    moves = trainer.ref_model.provider.on_step_end

    def beside(step):
        moves(step)
        merged = copy.deepcopy(trainer.model)
        merged.delete_adapter("ref")
        for name, weight in merged.merge_and_unload().state_dict().items():
            reference[name] = alpha * weight.double() + (1 - alpha) * reference[name]

    trainer.ref_model.provider.on_step_end = beside
    trainer.train()
    model = AutoModelForCausalLM.from_pretrained(path)
    model.load_state_dict(reference)
    batch = tokens(trainer)
    ours = trainer.ref_model(**batch).log_probs
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    expected = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0].masked_fill(labels == -100, 0)
    torch.testing.assert_close(ours, expected, atol=2e-3, rtol=0)
    policy = trainer.model(**{k: v for k, v in batch.items() if k != "fused_lm_head"}, fused_lm_head=True).log_probs
    assert not torch.allclose(policy, expected, atol=0.05)


@pytest.mark.parametrize("provider_of_first", ["exact", "factors"])
def test_optimizer_and_flags_do_not_see_the_second_adapter(provider_of_first, tmp_path):
    trainer = build(
        "dpo", tmp_path, tiny.saved(tmp_path), args=ema(average=provider_of_first), peft_config=lora(use_dora=True)
    )
    trainer.train()
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    names = {name for name, p in trainer.model.named_parameters() if id(p) in held}
    assert names
    assert not any(".ref." in name for name in names)


class TestSaved:
    """What the user saves as the model does not have the second adapter."""

    @pytest.fixture(params=[{}, {"use_dora": True}, {"modules_to_save": ["embed_tokens"]}], ids=str)
    def trainer(self, request, tmp_path):
        args = {**ema(alpha=0.5), "save_strategy": "steps", "save_steps": 5}
        trainer = build("dpo", tmp_path / "out", tiny.saved(tmp_path), args=args, peft_config=lora(**request.param))
        trainer.train()
        return trainer

    def check(self, trainer, directory, tmp_path):
        from safetensors import safe_open

        assert not (directory / "ref").exists()
        files = [p for p in directory.rglob("*.safetensors") if "refplug" not in p.parts]
        assert [p.relative_to(directory).name for p in files] == ["adapter_model.safetensors"]
        with safe_open(files[0], framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no mapping)
        assert shapes
        assert not any("ref" in name.split(".") for name in shapes)
        assert all(min(shape) == 4 for name, shape in shapes.items() if "lora_A" in name or "lora_B" in name)
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny.saved(tmp_path)), directory)
        assert set(loaded.peft_config) == {"default"}
        ids = torch.arange(3, 23)[None]
        with torch.no_grad():
            expected = trainer.model.eval()(ids).logits
            torch.testing.assert_close(loaded.eval()(ids).logits, expected)

    def test_by_the_trainer(self, trainer, tmp_path):
        trainer.save_model(str(tmp_path / "saved"))
        self.check(trainer, tmp_path / "saved", tmp_path)

    def test_in_checkpoints(self, trainer, tmp_path):
        self.check(trainer, tmp_path / "out" / "checkpoint-5", tmp_path)

    def test_by_the_model_itself(self, trainer, tmp_path):
        trainer.model.save_pretrained(tmp_path / "saved")
        self.check(trainer, tmp_path / "saved", tmp_path)
        copy.deepcopy(trainer.model).save_pretrained(str(tmp_path / "copied"))
        self.check(trainer, tmp_path / "copied", tmp_path)

    def test_merged(self, trainer, tmp_path):
        ids = torch.arange(3, 23)[None]
        with torch.no_grad():
            expected = trainer.model.eval()(ids).logits
            trainer.model.merge_and_unload().save_pretrained(tmp_path / "merged")
            merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
            torch.testing.assert_close(merged.eval()(ids).logits, expected, atol=1e-4, rtol=1e-4)

    def test_by_name_if_asked_for(self, trainer, tmp_path):
        trainer.model.save_pretrained(tmp_path / "asked", selected_adapters=["ref"])
        assert (tmp_path / "asked" / "ref" / "adapter_model.safetensors").is_file()


class TestRefused:
    @pytest.mark.parametrize("kind", KINDS)
    def test_biases(self, kind, tmp_path):
        with pytest.raises(ImpureReferenceError, match=r"ref_provider='ema'.*bias='none'"):
            build(kind, tmp_path, tiny.saved(tmp_path), args=ema(), peft_config=lora(bias="all"))

    def test_other_adapters(self, tmp_path):
        config = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
        with pytest.raises(ConfigurationError, match="IA3"):
            build("dpo", tmp_path, tiny.saved(tmp_path), args=ema(), peft_config=config)

    def test_reference_model(self, tmp_path):
        with pytest.raises(ConfigurationError, match="Remove `ref_model`"):
            build("dpo", tmp_path, tiny.saved(tmp_path), args=SYNCING, peft_config=lora(), ref_model=tiny.model())

    def test_rank(self, tmp_path):
        with pytest.raises(ConfigurationError, match="max_rank=2 is less than the rank 4"):
            build("dpo", tmp_path, tiny.saved(tmp_path), args=ema(max_rank=2), peft_config=lora())


def test_bfloat16(tmp_path):
    args = {**ema(alpha=0.01, sync_steps=1), "bf16": True, "model_init_kwargs": {"dtype": "bfloat16"}}
    run = train("grpo", tmp_path, tiny.saved(tmp_path), args=args, peft_config=lora())
    assert logged(run, "ref/syncs")[-1] == 5
    assert all(math.isfinite(entry["kl"]) for entry in run.logs)


def test_nothing_else_changes(tmp_path):
    """The second adapter changes no gradient, random number, mode or batch, as `adapter` promises of its own."""
    trainer = build("grpo", tmp_path, tiny.saved(tmp_path), args=ema(), peft_config=LoraConfig(
        r=4, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.3
    ))  # fmt: skip
    trainer.model.train()
    flags = {name: p.requires_grad for name, p in trainer.model.named_parameters()}
    modes = {name: m.training for name, m in trainer.model.named_modules()}
    rng, batch = torch.get_rng_state(), tokens(trainer)
    first = trainer.ref_model(**batch).log_probs
    assert torch.equal(first, trainer.ref_model(**batch).log_probs)
    trainer.ref_model.provider.on_step_end(2)
    trainer.ref_model.provider.counters()
    assert {name: p.requires_grad for name, p in trainer.model.named_parameters()} == flags
    assert {name: m.training for name, m in trainer.model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), rng)
    assert trainer.model.active_adapter == "default"
    assert finished(trainer).logs == []
