"""A digest changes with everything that changes a log-prob, and with nothing else."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from trl_refplug import ConfigurationError
from trl_refplug.models.identity import digest_model
from trl_refplug.testing.ranks import launch

from .. import tiny
from . import two_ranks_digest


@pytest.fixture
def model():
    return tiny.model("llama")


def lora(model, name="default", **overrides):
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **overrides)
    return get_peft_model(copy.deepcopy(model), config, adapter_name=name)


@pytest.mark.parametrize("architecture", list(tiny.ARCHITECTURES))
def test_every_weight_counts(architecture):
    model = tiny.model(architecture)
    digest = digest_model(model)
    seen = {digest}
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        kept = flat[-1].item()
        flat[-1] += 0.5
        seen.add(digest_model(model))
        flat[-1] = kept
    assert len(seen) == 1 + len(list(model.parameters()))
    assert digest_model(model) == digest


def test_dtype_and_shape_count(model):
    assert digest_model(copy.deepcopy(model).to(torch.bfloat16)) != digest_model(model)


@pytest.mark.parametrize(
    "change", [{"rms_norm_eps": 1e-3}, {"rope_parameters": {"rope_type": "default", "rope_theta": 9.0}}]
)
def test_configuration_counts(model, change):
    assert digest_model(tiny.model("llama", **change)) != digest_model(model)


def test_names_versions_and_padding_do_not(model, tmp_path):
    digest = digest_model(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._name_or_path != model.config._name_or_path
    loaded.config.pad_token_id = 7
    assert digest_model(loaded) == digest


def test_wrappers_do_not(model):
    digest = digest_model(model)
    assert digest_model(torch.compile(model)) == digest
    assert digest_model(lora(model)) == digest
    assert digest_model(lora(model, modules_to_save=["lm_head", "norm"])) == digest
    assert digest_model(lora(model, use_dora=True)) == digest


def test_tied_weights_count_once():
    tied = tiny.model("llama", tie_word_embeddings=True)
    assert digest_model(lora(tied)) == digest_model(tied)


class TestAdapters:
    def test_adapter_counts_when_it_is_part_of_the_distribution(self, model):
        adapted = lora(model)
        with_adapter = digest_model(adapted, adapter="default")
        assert with_adapter != digest_model(adapted)
        with torch.no_grad():
            next(p for n, p in adapted.named_parameters() if "lora_A" in n).add_(1.0)
        assert digest_model(adapted, adapter="default") != with_adapter
        assert digest_model(adapted) == digest_model(model)

    def test_every_one_of_its_tensors_counts(self):
        # Two adapted parameters of one module: PEFT nests one wrapper in the other.
        experts = ["experts.gate_up_proj", "experts.down_proj"]
        config = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=experts)
        adapted = get_peft_model(tiny.model("mixtral"), config)
        tensors = [parameter for name, parameter in adapted.named_parameters() if "lora_" in name]
        seen = {digest_model(adapted, adapter="default")}
        for tensor in tensors:
            tensor.data.view(-1)[-1] += 0.5
            seen.add(digest_model(adapted, adapter="default"))
        assert len(seen) == 1 + len(tensors)
        assert digest_model(adapted) == digest_model(adapted.unload())

    def test_its_name_does_not(self, model):
        torch.manual_seed(0)
        one = lora(model, "one")
        torch.manual_seed(0)
        two = lora(model, "two")
        assert digest_model(one, adapter="one") == digest_model(two, adapter="two")

    def test_its_scaling_does(self, model):
        torch.manual_seed(0)
        one = lora(model)
        torch.manual_seed(0)
        two = lora(model, lora_alpha=32)
        assert digest_model(one, adapter="default") != digest_model(two, adapter="default")


def test_sharding_does_not():
    digests = launch(two_ranks_digest.of_sharded, "qwen3")
    assert set(digests.values()) == {digest_model(tiny.model("qwen3"))}


def test_unloaded_weights_are_refused(model):
    with pytest.raises(ConfigurationError, match="meta device"):
        digest_model(model.to("meta"))


def test_weights_on_the_first_rank_only(model):
    """With FSDP's memory-saving loading, the other ranks have no weights yet, but the same digest."""
    digests = launch(two_ranks_digest.of_first_rank_only, "llama")
    assert set(digests.values()) == {digest_model(model)}
