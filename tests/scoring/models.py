"""
Tiny random models and batches, made on the fly.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from trl_refplug.provider import ReferenceBatch


VOCAB = 61

_SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_GROUPED = {**_SMALL, "num_key_value_heads": 2, "max_position_embeddings": 256}

_SEES = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
_SEES |= {"image_size": 8, "patch_size": 4}
_QWEN_SEES = {"depth": 1, "num_heads": 2, "hidden_size": 32, "embed_dim": 16, "out_hidden_size": 32}
_THREE_POSITIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
_QWEN_TOKENS = {"image_token_id": 60, "video_token_id": 59, "vision_start_token_id": 58, "vision_end_token_id": 57}

SEEING: dict[str, dict[str, Any]] = {
    "llava": {"text": {"model_type": "llama"}, "vision": {"model_type": "clip_vision_model", **_SEES}},
    "gemma3": {"text": {"query_pre_attn_scalar": 8}, "vision": _SEES, "mm_tokens_per_image": 4},
    "qwen2_vl": {"text": {"rope_parameters": _THREE_POSITIONS}, "vision": _QWEN_SEES, **_QWEN_TOKENS},
    "qwen2_5_vl": {"text": {"rope_parameters": _THREE_POSITIONS}, "vision": _QWEN_SEES, **_QWEN_TOKENS},
}
"""Arguments of [`with_images`] that make a model of this type tiny, by model type."""

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {**_GROUPED},
    "qwen2": {**_GROUPED, "tie_word_embeddings": True},
    "qwen3": {**_GROUPED, "head_dim": 8},
    "gemma2": {**_GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "granite": {**_GROUPED, "logits_scaling": 3.0},
    "cohere": {**_GROUPED, "logit_scale": 0.3},
    "mixtral": {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**_GROUPED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "mistral": {**_GROUPED, "sliding_window": 64},
    "phi": {**_SMALL, "max_position_embeddings": 256},  # an LM head with a bias
    "gemma4_text": {  # layers whose heads are of different sizes
        **_GROUPED,
        "head_dim": 8,
        "global_head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 64,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB,
        "final_logit_softcapping": 3.0,
    },
}
"""Configuration that makes a model of this type tiny, by model type."""


def tiny(kind: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model of an architecture, with weights large enough for its predictions to depend on every token."""
    torch.manual_seed(seed)
    values = {"vocab_size": VOCAB, "initializer_range": 0.25, **ARCHITECTURES.get(kind, _SMALL), **overrides}
    values |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**values)).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.bias is not None:
            torch.nn.init.normal_(module.bias, std=0.2)
    return model


def with_images(kind: str, text: dict[str, Any], vision: dict[str, Any], **options: Any) -> PreTrainedModel:
    """A random model that takes images and text. Its text side is as small as that of the other tiny models."""
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.25}
    config = CONFIG_MAPPING[kind](
        text_config={"vocab_size": VOCAB, **_GROUPED, "head_dim": 8, **special, **text},
        vision_config=vision,
        **options,
    )
    return AutoModelForImageTextToText.from_config(config).eval()


def batch_of(
    prompts: list[list[int]], completions: list[list[int]], side: str = "right", spare_columns: int = 0
) -> ReferenceBatch:
    """A padded batch of prompts with their completions, which are scored. The padding is token 0."""
    rows = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    columns = max(map(len, rows)) + spare_columns
    input_ids = torch.zeros(len(rows), columns, dtype=torch.int64)
    attention_mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, -100)
    for line, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        start = columns - len(row) if side == "left" else 0
        input_ids[line, start : start + len(row)] = torch.tensor(row, dtype=torch.int64)
        attention_mask[line, start : start + len(row)] = 1
        labels[line, start + len(prompt) : start + len(row)] = torch.tensor(row[len(prompt) :], dtype=torch.int64)
    return ReferenceBatch(input_ids, attention_mask, labels)


def random_batch(
    seed: int = 0, groups: int = 3, size: int = 2, side: str = "right", prompt: int = 12, completion: int = 7
) -> ReferenceBatch:
    """Groups of completions that share a prompt, as pairs or GRPO groups do; all start with the same 5 tokens."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, VOCAB, (count,), generator=generator).tolist()

    system, prompts, completions = tokens(5), [], []
    for group in range(groups):
        asked = system + tokens(prompt + group)
        for member in range(size):
            prompts.append(asked)
            completions.append(tokens(1 + (completion + 3 * member + group) % (completion + 3)))
    return batch_of(prompts, completions, side)
