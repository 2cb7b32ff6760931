"""Multimodal inputs pass through to in-process providers."""

import pytest
from peft import LoraConfig

from .. import tiny
from .runs import assert_same, train


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
@pytest.mark.parametrize("provider", ["frozen", "adapter"])
def test_vision_language_model_equals_trl(kind, provider, tmp_path):
    tiny.vision_model().save_pretrained(tmp_path / "llava")
    kwargs = {
        "processing_class": tiny.vision_processor(),
        "train_dataset": tiny.vision_data(kind=kind),
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
