"""Providers without a model of their own never hold a second copy, not even while the trainer is being built."""

import gc

import pytest
import torch
from peft import LoraConfig
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from .. import tiny
from ..serving.servers import ServerProcess
from .runs import ONLINE, build


def peak_bytes(action):
    """The largest amount of memory that was allocated at once while `action` ran, beyond what was allocated before."""
    gc.collect()  # the garbage of earlier trainers must not be freed during the measurement
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            kept = action()
    finally:
        gc.enable()
    level = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    del kept
    return peak


@pytest.mark.parametrize("kind", ["dpo", *ONLINE])
def test_no_second_copy(kind, tmp_path):
    model = AutoModelForCausalLM.from_config(tiny.model("llama", hidden_size=256, intermediate_size=12288).config)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert size > 6e7  # TRL's LM head takes 9 MB for any question, the probe's as well
    peft_config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")

    def construct(**args):
        # `build` copies the policy that it gets. That takes the memory of one model, which is not the trainer's doing.
        return build(kind, tmp_path, model, args=args, peft_config=peft_config)

    construct(ref_provider="adapter")  # imports and caches
    adapter = peak_bytes(lambda: construct(ref_provider="adapter"))
    frozen = peak_bytes(lambda: construct(ref_provider="frozen"))
    assert adapter < 1.2 * size  # that copy, the adapter's factors, and tokenized data
    assert frozen > 1.9 * size  # if there is a second copy, the measurement shows it


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_no_second_copy_while_a_store_is_filled(peft, tmp_path):
    model = AutoModelForCausalLM.from_config(tiny.model("llama", hidden_size=768, intermediate_size=2048).config)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    peft_config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM") if peft else None

    def construct(provider, **options):
        args = {"ref_provider": provider, "ref_provider_kwargs": options}
        data = tiny.preference_data(4)
        return build("dpo", tmp_path, model, args=args, peft_config=peft_config, train_dataset=data)

    construct("cached", path=str(tmp_path / "first"))
    filling = peak_bytes(lambda: construct("cached", path=str(tmp_path / "second")))
    frozen = peak_bytes(lambda: construct("frozen"))
    assert filling < 1.5 * size  # the copy that `build` makes; the rest are activations
    assert frozen > 1.9 * size


def test_a_step_holds_none_either(tmp_path):
    model = AutoModelForCausalLM.from_config(tiny.model("llama", hidden_size=256, intermediate_size=512).config)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    peft_config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = build("dpo", tmp_path, model, args={"ref_provider": "adapter"}, peft_config=peft_config)
    ids = torch.ones(1, 4, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": ids, "labels": ids, "fused_lm_head": True}
    trainer.ref_model(**batch)
    assert peak_bytes(lambda: trainer.ref_model(**batch)) < 0.5 * size


def test_no_copy_of_a_model_that_is_served_elsewhere(tmp_path):
    model = AutoModelForCausalLM.from_config(tiny.model("llama", hidden_size=256, intermediate_size=512).config)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")

    def construct_and_ask(**args):
        trainer = build("dpo", tmp_path, model, args=args)
        ids = torch.ones(1, 4, dtype=torch.long)
        trainer.ref_model(input_ids=ids, attention_mask=ids, labels=ids, fused_lm_head=True)
        return trainer

    with ServerProcess(str(tmp_path / "model"), "--port", "0") as server:
        remote = {"ref_provider": "remote", "ref_provider_kwargs": {"url": server.wait()}, "ref_check": "off"}
        construct_and_ask(**remote)  # imports and caches
        served = peak_bytes(lambda: construct_and_ask(**remote))
    frozen = peak_bytes(lambda: construct_and_ask(ref_provider="frozen", ref_check="off"))
    assert served < 1.2 * size  # the policy's copy that `build` makes
    assert frozen > 1.9 * size
