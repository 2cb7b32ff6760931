"""
Every causal language model that transformers has, as far as it can be built small: packed answers are TRL's, whether
they were packed or fell back to the exact call.
"""

import inspect
import warnings

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.scoring.models import VOCAB, random_batch
from tests.scoring.test_scorer import trl_log_probs
from trl_refplug.errors import UnsupportedInputError
from trl_refplug.scoring import Scorer


TOLERANCE = 5e-5
"""Nats per token. Some of these models have larger logits than the models of other tests."""

LARGEST = 400_000
"""Most parameters of a model that is built."""

SMALL = {
    2: "num_hidden_layers n_layer n_layers num_layers num_key_value_heads num_experts_per_tok linear_num_key_heads "
    "linear_num_value_heads mamba_num_heads",
    4: "num_attention_heads n_head n_heads num_heads num_experts num_local_experts n_routed_experts",
    8: "head_dim rotary_dim v_head_dim qk_rope_head_dim qk_nope_head_dim linear_key_head_dim linear_value_head_dim "
    "mamba_head_dim mamba_state_size ssm_state_size state_size hidden_size_per_layer_input",
    16: "q_lora_rank kv_lora_rank",
    24: "moe_intermediate_size shared_expert_intermediate_size",
    32: "hidden_size n_embd d_model",
    48: "intermediate_size ffn_dim d_ff ffn_hidden_size",
    256: "max_position_embeddings n_positions",
    1: "n_group topk_group first_k_dense_replace",
    VOCAB: "vocab_size vocab_size_per_layer_input",
}


def small(kind):
    """A small random model of this type. Raises where that cannot be made."""
    config = CONFIG_MAPPING[kind]
    known = {*inspect.signature(config.__init__).parameters, *getattr(config, "attribute_map", {})}
    known |= {name for base in config.__mro__ for name in getattr(base, "__annotations__", {})}
    if "kv_lora_rank" in known:
        known -= {"head_dim", "num_key_value_heads"}  # these follow from other entries
    values = {name: value for value, names in SMALL.items() for name in names.split() if name in known}
    configured = config(**values, initializer_range=0.25, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(configured).parameters())
    if parameters > LARGEST:
        raise ValueError(f"{parameters:,} parameters")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(configured).eval()


KNOWN_TO_PACK = {
    *("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text"),
    *("gemma4_text", "gemma4_unified_text", "phi", "phi3", "deepseek_v3", "glm4", "glm4_moe", "olmo2", "smollm3"),
    *("granite", "cohere2", "starcoder2", "stablelm", "gpt2", "gpt_neox"),
}
KNOWN_NOT_TO = {"bloom", "mpt", "mamba", "jamba", "qwen3_next", "gpt_oss", "xglm", "opt", "bert", "rwkv"}
KNOWN_TO_REFUSE = {"dory"}
"""Their output embeddings do more than multiply by a matrix, which TRL's fused loss leaves out."""


def test_every_architecture():
    packed, exact, unbuilt, refused, wrong = set(), {}, {}, {}, {}
    batches = {side: random_batch(size=3, side=side) for side in ("left", "right")}
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                model = small(kind)
                expected = {side: trl_log_probs(model, batch) for side, batch in batches.items()}
            except Exception as error:
                unbuilt[kind] = f"{type(error).__name__}: {error}"
                continue
            scorer = Scorer(model, mode="packed")
            for side, batch in batches.items():
                scorer.stats.clear()
                try:
                    difference = (scorer.log_probs(batch) - expected[side]).abs().max().item()
                except UnsupportedInputError as error:
                    refused[kind] = str(error)
                    break
                if not difference <= (TOLERANCE if scorer.stats.fallback is None else 0):
                    wrong[kind, side] = difference
            if kind in refused:
                continue
            if scorer.stats.fallback is None:  # for the right side, the last one
                packed.add(kind)
            else:
                exact[kind] = scorer.stats.fallback
    for title, kinds in (("scored exactly", exact), ("refused", refused), ("not built", unbuilt)):
        print(f"{len(kinds)} {title}:", *(f"{kind}: {reason}" for kind, reason in kinds.items()), sep="\n  ")
    print(f"{len(packed)} packed:", *sorted(packed))
    assert not wrong
    assert packed >= KNOWN_TO_PACK
    assert exact.keys() >= KNOWN_NOT_TO
    assert refused.keys() <= KNOWN_TO_REFUSE
