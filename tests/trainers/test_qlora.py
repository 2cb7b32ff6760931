"""Runs of four-bit policies equal TRL's, and their packed weights do not change. These tests need bitsandbytes."""

import pytest
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from .. import tiny
from .runs import assert_same, train


pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
@pytest.mark.parametrize("provider", ["adapter", "frozen"])
def test_equals_trl(kind, provider, tmp_path):
    kwargs = {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
        "peft_config": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    }
    path = tiny.saved(tmp_path, hidden_size=64, intermediate_size=128)
    theirs = train(kind, tmp_path / "trl", path, ours=False, **kwargs)
    assert_same(train(kind, tmp_path / "ours", path, args={"ref_provider": provider}, **kwargs), theirs)


def test_quantized_reference(tmp_path):
    path = tiny.saved(tmp_path, hidden_size=64, intermediate_size=128)
    options = {"model": path, "quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}
    run = train("dpo", tmp_path, path, args={"ref_provider": "frozen", "ref_provider_kwargs": options})
    assert torch.uint8 in {p.dtype for p in run.trainer.ref_model.parameters()}
    assert run.logs[0]["loss"] != pytest.approx(0.6931, abs=1e-4)
