"""Same seed, same machine: our trainers' losses, rewards and weights are TRL's own, bit for bit."""

import pytest
from peft import LoraConfig, PeftModel, get_peft_model

from .. import tiny
from .runs import DATA, KINDS, ONLINE, assert_same, finished, train, trainer_class


def lora(architecture="llama", **overrides):
    gpt2 = architecture == "gpt2"
    targets = ["c_attn"] if gpt2 else "all-linear"
    return LoraConfig(r=4, target_modules=targets, fan_in_fan_out=gpt2, task_type="CAUSAL_LM", **overrides)


def compare(kind, tmp_path, model, provider, args=None, **kwargs):
    args = args or {}
    theirs = train(kind, tmp_path / "trl", model, ours=False, args=args, **kwargs)
    ours = train(kind, tmp_path / "ours", model, args={**args, "ref_provider": provider}, **kwargs)
    assert_same(ours, theirs)
    return ours


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gpt2", "gemma2", "gemma4_text", "mixtral"])
@pytest.mark.parametrize("kind", KINDS)
class TestArchitectures:
    def test_full_fine_tuning_with_frozen(self, kind, architecture, tmp_path):
        compare(kind, tmp_path, tiny.saved(tmp_path, architecture), "frozen")

    def test_lora_with_adapter(self, kind, architecture, tmp_path):
        if architecture == "mixtral":
            peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        else:
            peft_config = lora(architecture)
        compare(kind, tmp_path, tiny.saved(tmp_path, architecture), "adapter", peft_config=peft_config)


@pytest.mark.parametrize(
    "args",
    [
        {"loss_type": ["ipo"]},
        {"loss_type": ["hinge"]},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 0.2]},
        {"loss_type": ["apo_zero"]},
        {"ld_alpha": 0.5},
        {"f_divergence_type": "js_divergence"},
        {"f_divergence_type": "forward_kl"},
        {"label_smoothing": 0.1, "loss_type": ["robust"]},
    ],
    ids=str,
)
def test_dpo_losses(args, tmp_path):
    compare("dpo", tmp_path, tiny.saved(tmp_path), "frozen", args=args)


def test_kto_without_kl(tmp_path):
    compare("kto", tmp_path, tiny.saved(tmp_path), "frozen", args={"loss_type": "apo_zero_unpaired"})


@pytest.mark.parametrize("kind", KINDS)
class TestSettings:
    def test_lora_with_frozen(self, kind, tmp_path):
        compare(kind, tmp_path, tiny.saved(tmp_path), "frozen", peft_config=lora())

    def test_bf16_autocast(self, kind, tmp_path):
        compare(kind, tmp_path, tiny.saved(tmp_path), "frozen", args={"bf16": True})
        compare(kind, tmp_path, tiny.saved(tmp_path), "adapter", args={"bf16": True}, peft_config=lora())

    def test_bf16_weights(self, kind, tmp_path):
        args = {"bf16": True, "model_init_kwargs": {"dtype": "bfloat16"}}
        compare(kind, tmp_path, tiny.saved(tmp_path), "frozen", args=args)

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_gradient_checkpointing(self, kind, checkpointing, tmp_path):
        args = {"gradient_checkpointing": checkpointing}
        compare(kind, tmp_path, tiny.saved(tmp_path), "frozen", args=args)
        compare(kind, tmp_path, tiny.saved(tmp_path), "adapter", args=args, peft_config=lora())

    def test_gradient_accumulation_and_evaluation(self, kind, tmp_path):
        args = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}
        ours = compare(kind, tmp_path, tiny.saved(tmp_path), "frozen", args=args, eval_dataset=DATA[kind](6))
        assert any("eval_loss" in entry for entry in ours.logs)

    def test_pretrained_adapter(self, kind, tmp_path):
        base = tiny.saved(tmp_path)
        compare(kind, tmp_path, pretrained(base, tmp_path), "adapter")

    def test_pretrained_adapter_with_frozen(self, kind, tmp_path):
        theirs = train(kind, tmp_path / "trl", pretrained(tiny.saved(tmp_path), tmp_path), ours=False)
        args = {"ref_provider": "frozen"}
        ours = train(kind, tmp_path / "ours", pretrained(tiny.saved(tmp_path), tmp_path), args=args)
        assert "ref" not in ours.trainer.model.peft_config  # TRL's extra adapter is not the reference here
        theirs.weights = {name: weight for name, weight in theirs.weights.items() if ".ref." not in name}
        assert_same(ours, theirs)

    def test_auto_changes_nothing(self, kind, tmp_path):
        compare(kind, tmp_path, tiny.saved(tmp_path), "auto")
        compare(kind, tmp_path, tiny.saved(tmp_path), "auto", peft_config=lora())

    def test_packed_scoring_agrees(self, kind, tmp_path):
        path = tiny.saved(tmp_path)
        exact = train(kind, tmp_path / "exact", path, args={"ref_provider": "frozen", "max_steps": 2})
        args = {"ref_provider": "frozen", "ref_provider_kwargs": {"scoring": "packed"}, "max_steps": 2}
        packed = train(kind, tmp_path / "packed", path, args=args)
        # float32 sums over about ten tokens, after one step of training
        assert packed.logs[1]["loss"] == pytest.approx(exact.logs[1]["loss"], abs=1e-4)


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_iterable_dataset(kind, tmp_path):
    args = {"loss_type": "apo_zero_unpaired"} if kind == "kto" else {}  # TRL's KL rows need the whole dataset
    compare(
        kind, tmp_path, tiny.saved(tmp_path), "frozen", args=args, train_dataset=DATA[kind]().to_iterable_dataset()
    )


@pytest.mark.parametrize("provider", ["frozen", "adapter"])
def test_grpo_casts_lm_head(provider, tmp_path):
    args = {"cast_lm_head_to_fp32": True, "bf16": True, "model_init_kwargs": {"dtype": "bfloat16"}}
    compare("grpo", tmp_path, tiny.saved(tmp_path), provider, args=args, peft_config=lora())
    if provider == "frozen":
        compare("grpo", tmp_path, tiny.saved(tmp_path), provider, args=args)
        tied = tiny.saved(tmp_path / "tied", tie_word_embeddings=True)
        compare("grpo", tmp_path, tied, provider, args=args)


@pytest.mark.parametrize("kind", ONLINE)
def test_num_iterations_and_generation_batches(kind, tmp_path):
    args = {"num_iterations": 2, "steps_per_generation": 2, "max_steps": 4}
    compare(kind, tmp_path, tiny.saved(tmp_path), "frozen", args=args)


@pytest.mark.parametrize("kind", KINDS)
def test_instance_policy(kind, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny.saved(tmp_path))
    compare(kind, tmp_path, model, "frozen")
    compare(kind, tmp_path, model, "adapter", peft_config=lora())


def test_arguments_of_trl_itself(tmp_path):
    """Only the trainer's import is changed, not the configuration's."""
    from trl import DPOConfig

    args = DPOConfig(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    trainer = trainer_class("dpo")(
        model=tiny.saved(tmp_path),
        args=args,
        train_dataset=tiny.preference_data(),
        processing_class=tiny.tokenizer(),
    )
    trainer.train()
    assert_same(finished(trainer), train("dpo", tmp_path, tiny.saved(tmp_path), ours=False))


def pretrained(base, tmp_path):
    """A policy that comes with a trained adapter, whose weights are not those of a new one."""
    import torch
    from transformers import AutoModelForCausalLM

    path = tmp_path / "adapter"
    if not path.exists():
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora())
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(path)
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path, is_trainable=True)
