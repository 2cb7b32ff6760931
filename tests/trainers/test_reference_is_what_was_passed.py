"""The reference is the policy exactly as it was passed in, so the difference between the two is 0 at the start."""

import math

import pytest
import torch
from accelerate import dispatch_model
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from trl_refplug import ConfigurationError, ReferenceMismatchError, RefPlugDPOTrainer
from trl_refplug.models.copies import snapshot
from trl_refplug.providers.frozen import FrozenOptions
from trl_refplug.providers.named_model import loading
from trl_refplug.trainers.policy import output_device

from .. import tiny
from .runs import KINDS, ONLINE, build, config, train


LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
NO_DROPOUT = {"disable_dropout": True}


def starts_at_zero(kind, run):
    first = run.logs[0]
    if kind == "dpo":
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-6)
    else:
        assert first["kl"] == pytest.approx(0.0, abs=1e-6)


def edited(path):
    model = AutoModelForCausalLM.from_pretrained(path)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_policy_edited_in_memory(kind, tmp_path):
    run = train(
        kind, tmp_path, edited(tiny.saved(tmp_path)), args={**NO_DROPOUT, "temperature": 1.0} if kind in ONLINE else {}
    )
    starts_at_zero(kind, run)


def test_trl_gets_an_edited_policy_wrong(tmp_path):
    """The problem exists: with TRL's own trainer, the loss of the same run does not start at ln 2."""
    run = train("dpo", tmp_path, edited(tiny.saved(tmp_path)), ours=False)
    assert abs(run.logs[0]["loss"] - math.log(2)) > 0.01


def test_merged_policy(tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny.saved(tmp_path)), LORA)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    starts_at_zero("dpo", train("dpo", tmp_path, model.merge_and_unload()))


@pytest.mark.parametrize("kind", KINDS)
def test_attention_dropout(kind, tmp_path):
    path = tiny.saved(tmp_path, attention_dropout=0.3)
    run = train(kind, tmp_path, path, args=NO_DROPOUT)
    starts_at_zero(kind, run)
    # The configuration is saved with the model, and must not change.
    assert run.trainer.model.config.attention_dropout == 0.3


def test_policy_with_no_name(tmp_path):
    """A model built from a configuration has no path that a reference could be loaded from."""
    starts_at_zero("dpo", train("dpo", tmp_path, tiny.model("llama")))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("provider", ["frozen", "adapter"])
def test_pretrained_adapter_of_any_name(kind, provider, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny.saved(tmp_path)), LORA, adapter_name="mine")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    run = train(kind, tmp_path, model, args={**NO_DROPOUT, "ref_provider": provider})
    starts_at_zero(kind, run)
    assert set(run.trainer.model.peft_config) == ({"mine", "ref"} if provider == "adapter" else {"mine"})
    assert run.trainer.model.active_adapter == "mine"


class TestNoCopyOfTRLs:
    """TRL's own second copy is never loaded beside the provider's."""

    @pytest.fixture
    def loads(self, monkeypatch):
        from trl.trainer import utils

        calls = []
        for kind in KINDS:
            import importlib

            module = importlib.import_module(f"trl.trainer.{kind}_trainer")
            monkeypatch.setattr(
                module,
                "create_model_from_path",
                lambda *a, **k: calls.append(a[0]) or utils.create_model_from_path(*a, **k),
            )
        return calls

    @pytest.mark.parametrize("kind", KINDS)
    def test_string_policy_is_loaded_once(self, kind, loads, tmp_path):
        path = tiny.saved(tmp_path)
        build(kind, tmp_path, path, args={"ref_provider": "frozen"})
        assert loads == [path]

    @pytest.mark.parametrize("kind", KINDS)
    def test_instance_policy_loads_nothing(self, kind, loads, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(tiny.saved(tmp_path))
        build(kind, tmp_path, model, args={"ref_provider": "frozen"})
        assert loads == []

    @pytest.mark.parametrize("kind", KINDS)
    def test_loader_is_put_back(self, kind, tmp_path):
        import importlib

        from trl.trainer.utils import create_model_from_path

        module = importlib.import_module(f"trl.trainer.{kind}_trainer")
        build(kind, tmp_path, tiny.saved(tmp_path))
        assert module.create_model_from_path is create_model_from_path
        with pytest.raises(TypeError):
            build(kind, tmp_path, tiny.saved(tmp_path), processing_class=3)
        assert module.create_model_from_path is create_model_from_path


class TestNamedReference:
    def test_other_model(self, tmp_path):
        other = tiny.saved(tmp_path / "other", seed=1)
        args = {"ref_provider": "frozen", "ref_provider_kwargs": {"model": other}}
        ours = train("dpo", tmp_path, tiny.saved(tmp_path), args=args)
        given = AutoModelForCausalLM.from_pretrained(other)
        theirs = train("dpo", tmp_path, tiny.saved(tmp_path), ours=False, ref_model=given)
        assert ours.logs == theirs.logs
        assert ours.logs[0]["loss"] != pytest.approx(math.log(2), abs=1e-3)

    @pytest.mark.parametrize("kind", KINDS)
    def test_ref_model_argument(self, kind, tmp_path):
        """It works as in TRL, and for GRPO and RLOO as well."""
        path = tiny.saved(tmp_path)
        other = tiny.model(seed=1)
        ours = train(kind, tmp_path, path, ref_model=other)
        named = tmp_path / "named"
        other.save_pretrained(named)
        args = {"ref_provider": "frozen", "ref_provider_kwargs": {"model": str(named)}}
        assert ours.logs == train(kind, tmp_path, path, args=args).logs
        if kind not in ONLINE:
            assert ours.logs == train(kind, tmp_path, path, ours=False, ref_model=other).logs

    @pytest.mark.parametrize("kind", KINDS)
    def test_ref_model_argument_with_lora(self, kind, tmp_path):
        ours = train(kind, tmp_path, tiny.saved(tmp_path), ref_model=tiny.model(seed=1), peft_config=LORA)
        if kind in ONLINE:
            assert ours.logs[0]["kl"] > 1e-3
        else:
            theirs = train(
                kind, tmp_path, tiny.saved(tmp_path), ours=False, ref_model=tiny.model(seed=1), peft_config=LORA
            )
            assert ours.logs == theirs.logs

    def test_device_and_dtype(self, tmp_path):
        args = {"ref_provider": "frozen", "ref_provider_kwargs": {"device": "cpu"}}
        ours = train("dpo", tmp_path, tiny.saved(tmp_path), args=args)
        assert ours.logs == train("dpo", tmp_path, tiny.saved(tmp_path), ours=False).logs
        args = {"ref_provider": "frozen", "ref_provider_kwargs": {"dtype": "bfloat16"}}
        run = train("dpo", tmp_path, tiny.saved(tmp_path), args=args)
        assert {p.dtype for p in run.trainer.ref_model.parameters()} == {torch.bfloat16}

    def test_loads_remote_code_where_the_policy_does(self, tmp_path):
        for given, expected in (({}, False), ({"trust_remote_code": True}, True)):
            args = config("dpo", tmp_path, model_init_kwargs=given)
            assert loading(FrozenOptions(model="x"), tiny.model(), args)["trust_remote_code"] is expected

    def test_model_that_is_not_there(self, tmp_path):
        args = {"ref_provider": "frozen", "ref_provider_kwargs": {"model": str(tmp_path / "nowhere")}}
        with pytest.raises(ConfigurationError, match="nowhere"):
            build("dpo", tmp_path, tiny.saved(tmp_path), args=args)


class TestInProcessCopy:
    def test_parameters_answer_and_stay(self, tmp_path):
        trainer = build("dpo", tmp_path, tiny.saved(tmp_path))
        before = {name: p.clone() for name, p in trainer.ref_model.named_parameters()}
        assert before.keys() == dict(trainer.model.named_parameters()).keys()
        trainer.train()
        for name, value in before.items():
            assert torch.equal(trainer.ref_model.get_parameter(name), value)
            assert not torch.equal(trainer.model.get_parameter(name), value)
        assert not any(p.requires_grad for p in trainer.ref_model.parameters())

    def test_is_no_part_of_what_is_saved(self, tmp_path):
        trainer = build("dpo", tmp_path, tiny.saved(tmp_path))
        assert list(trainer.ref_model.state_dict()) == []
        assert list(trainer.ref_model.modules()) == [trainer.ref_model]


class TestRefCheck:
    def changed(self, tmp_path, check):
        trainer = build("dpo", tmp_path, tiny.saved(tmp_path), args={"ref_check": check})
        with torch.no_grad():
            trainer.ref_model.provider.module.get_parameter("model.embed_tokens.weight").add_(0.5)
        return trainer

    def test_stops_at_another_reference(self, tmp_path):
        trainer = self.changed(tmp_path, "error")
        with pytest.raises(ReferenceMismatchError, match="nats per token") as error:
            trainer.train()
        assert "differ from those of the policy as it was passed in" in str(error.value)
        assert "ref_check" in str(error.value)
        assert trainer.state.global_step == 0

    def test_warns(self, tmp_path, caplog):
        self.changed(tmp_path, "warn").train()
        assert "nats per token" in caplog.text
        assert "row  scored tokens  reference sum  policy sum" in caplog.text  # of the first batch

    def test_off(self, tmp_path, caplog):
        self.changed(tmp_path, "off").train()
        assert "nats per token" not in caplog.text

    @pytest.mark.parametrize("kind", KINDS)
    def test_stops_a_policy_changed_after_construction(self, kind, tmp_path):
        trainer = build(kind, tmp_path, tiny.saved(tmp_path))
        with torch.no_grad():
            trainer.model.get_parameter("model.embed_tokens.weight").add_(0.5)
        with pytest.raises(ReferenceMismatchError):
            trainer.train()

    def test_stops_whoever_goes_on_after_it(self, tmp_path):
        trainer = self.changed(tmp_path, "error")
        for _ in range(2):
            with pytest.raises(ReferenceMismatchError):
                trainer.train()
        assert trainer.state.global_step == 0

    def test_stops_a_policy_changed_after_an_evaluation(self, tmp_path):
        trainer = build("dpo", tmp_path, tiny.saved(tmp_path), eval_dataset=tiny.preference_data())
        trainer.evaluate()
        with torch.no_grad():
            trainer.model.get_parameter("model.embed_tokens.weight").add_(0.5)
        with pytest.raises(ReferenceMismatchError):
            trainer.train()

    def test_stops_a_policy_changed_after_a_resume_that_failed(self, tmp_path):
        path, out = tiny.saved(tmp_path), tmp_path / "out"
        train("dpo", out, path, args={"save_strategy": "steps", "save_steps": 2})
        (out / "checkpoint-2" / "trainer_state.json").unlink()
        trainer = build("dpo", out, path)
        for checkpoint in (out / "checkpoint-2", tmp_path / "nowhere"):
            with pytest.raises((OSError, ValueError)):
                trainer.train(resume_from_checkpoint=str(checkpoint))
        with torch.no_grad():
            trainer.model.get_parameter("model.embed_tokens.weight").add_(0.5)
        with pytest.raises(ReferenceMismatchError):
            trainer.train()

    def test_does_not_stop_training_that_goes_on(self, tmp_path):
        trainer = build("dpo", tmp_path, tiny.saved(tmp_path))
        trainer.train()
        trainer.train()
        assert trainer.state.global_step == 3

    def test_pulls_no_data(self, tmp_path):
        data = tiny.preference_data().to_iterable_dataset()
        on = train("dpo", tmp_path, tiny.saved(tmp_path), train_dataset=data, args={"ref_check": "error"})
        off = train("dpo", tmp_path, tiny.saved(tmp_path), train_dataset=data, args={"ref_check": "off"})
        assert on.logs == off.logs

    def test_says_what_a_wrong_value_is(self, tmp_path):
        from trl_refplug import ConfigurationError

        with pytest.raises(ConfigurationError, match="Did you mean 'error'"):
            config("dpo", tmp_path, ref_check="eror")


def test_no_side_effects_on_the_policy_passed_in(tmp_path):
    """The snapshot shares no storage with the policy."""
    model = AutoModelForCausalLM.from_pretrained(tiny.saved(tmp_path))
    trainer = RefPlugDPOTrainer(
        model=model,
        args=config("dpo", tmp_path),
        train_dataset=tiny.preference_data(),
        processing_class=tiny.tokenizer(),
    )
    storages = {p.data_ptr() for p in model.parameters()}
    assert storages.isdisjoint(p.data_ptr() for p in trainer.ref_model.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_loaded_peft_policy_keeps_only_its_adapter(tmp_path):
    base = tiny.saved(tmp_path)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), LORA).save_pretrained(tmp_path / "a")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "a", is_trainable=True)
    trainer = build("dpo", tmp_path, model, args={"ref_provider": "adapter", "ref_provider_kwargs": {"start": "base"}})
    assert set(trainer.model.peft_config) == {"default"}


class TestSpreadPolicies:
    """`device_map="auto"` spreads a policy over what GPUs there are; here all of them are the CPU."""

    @pytest.fixture
    def policy(self, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(tiny.saved(tmp_path))
        spread = dict.fromkeys(("model.embed_tokens", "model.layers", "model.norm", "lm_head"), "cpu")
        return dispatch_model(model, {**spread, "model.rotary_emb": "cpu"}, force_hooks=True)

    def test_a_copy_that_moves_leaves_the_policy_alone(self, policy):
        copied = snapshot(policy).to(torch.float64)
        assert {parameter.dtype for parameter in copied.parameters()} == {torch.float64}
        assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}

    def test_the_copy_is_made_where_it_will_be(self, policy):
        policy.lm_head.weight = policy.model.embed_tokens.weight
        copied = snapshot(policy, device="meta")
        assert {tensor.device.type for tensor in (*copied.parameters(), *copied.buffers())} == {"meta"}
        assert copied.lm_head.weight is copied.model.embed_tokens.weight
        assert {parameter.device.type for parameter in policy.parameters()} == {"cpu"}
        assert all(parameter.requires_grad for parameter in policy.parameters())

    @pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
    def test_training(self, policy, tmp_path, bf16):
        plain = train("dpo", tmp_path, tiny.saved(tmp_path), args={"ref_provider": "frozen", "bf16": bf16})
        using = {"ref_provider": "frozen", "ref_provider_kwargs": {"device": "cpu"}, "bf16": bf16}
        run = train("dpo", tmp_path, policy, args=using)
        assert run.logs == plain.logs
        placed = run.trainer.ref_model.provider.module
        assert not any(hasattr(module, "_hf_hook") for module in placed.modules())

    def test_training_of_an_adapter(self, policy, tmp_path):
        policy = get_peft_model(policy, LORA)
        using = {"ref_provider": "frozen", "ref_provider_kwargs": {"device": "cpu"}}
        run = train("dpo", tmp_path, policy, args=using)
        starts_at_zero("dpo", run)

    def test_answers_come_where_the_policys_do(self, policy):
        assert output_device(policy) is None
        policy.hf_device_map = {"model": "cuda:0", "lm_head": "cuda:1"}
        assert output_device(policy) == policy.lm_head.weight.device
