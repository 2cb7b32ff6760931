"""Providers with a model in this process get the multimodal inputs of a batch."""

import pytest
from peft import LoraConfig

from trl_refplug.testing.samples import image_preference_data, tiny_image_policy, tiny_image_processor

from .runs import assert_same, train


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
@pytest.mark.parametrize("provider", ["frozen", "adapter"])
def test_vision_language_model_equals_trl(kind, provider, tmp_path):
    policy = tiny_image_policy()
    policy.config.text_config.attention_dropout = 0.0  # with PEFT, TRL's reference would have dropout
    policy.save_pretrained(tmp_path / "llava")
    data = image_preference_data(8)
    kwargs = {
        "processing_class": tiny_image_processor(),
        "train_dataset": data if kind == "dpo" else data.remove_columns(["chosen", "rejected"]),
        "args": {"max_length": None} if kind == "dpo" else {},
    }
    if kind == "grpo":
        kwargs["reward_funcs"] = lambda completions, **_: [len(c[0]["content"]) / 10 for c in completions]
    if provider == "adapter":
        kwargs["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    theirs = train(kind, tmp_path / "trl", str(tmp_path / "llava"), ours=False, **kwargs)
    kwargs["args"] = {**kwargs["args"], "ref_provider": provider}
    ours = train(kind, tmp_path / "ours", str(tmp_path / "llava"), **kwargs)
    assert_same(ours, theirs)
