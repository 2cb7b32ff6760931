"""Tiny models, a tokenizer and data, all made on the fly: nothing is downloaded."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast


WORDS = (
    "the cat sat on a warm mat and looked at the rain while one small bird sang to nobody in particular because it "
    "was a good day for singing what is two plus three it is five why do leaves fall they fall in autumn when days "
    "are short"
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
COMMON: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": dict(COMMON, attention_bias=True),
    "qwen2": dict(COMMON),
    "qwen3": dict(COMMON, head_dim=8),
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=256, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "gemma2": dict(COMMON, head_dim=8, final_logit_softcapping=30.0, attn_logit_softcapping=50.0, sliding_window=64),
    "mixtral": dict(COMMON, num_local_experts=4, num_experts_per_tok=2),
    "gemma4_text": dict(
        COMMON,
        head_dim=8,
        global_head_dim=16,
        sliding_window=64,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=512,
    ),
}


@lru_cache(maxsize=1)
def tokenizer() -> PreTrainedTokenizerFast:
    base = Tokenizer(models.BPE(unk_token="<unk>"))
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = decoders.ByteLevel()
    special = ["<unk>", "<pad>", "<eos>", "<|user|>", "<|assistant|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    base.train_from_iterator([WORDS], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=base, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def model(architecture: str = "llama", seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random causal LM, about 30,000 parameters, with weights large enough for its log-probs to vary."""
    tok = tokenizer()
    config = AutoConfig.for_model(
        architecture,
        **{
            "vocab_size": len(tok),
            "bos_token_id": tok.eos_token_id,
            "eos_token_id": tok.eos_token_id,
            "pad_token_id": tok.pad_token_id,
            "initializer_range": 0.2,
            **ARCHITECTURES[architecture],
            **overrides,
        },
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config)


def saved(directory: Path, architecture: str = "llama", **overrides: Any) -> str:
    """The same, on disk with its tokenizer."""
    path = directory / architecture
    if not path.exists():
        model(architecture, **overrides).save_pretrained(path)
        tokenizer().save_pretrained(path)
    return str(path)


def preference_data(rows: int = 12) -> Dataset:
    words = WORDS.split()
    pick = lambda start, count: " ".join(words[(start + i) % len(words)] for i in range(count))  # noqa: E731
    return Dataset.from_list(
        [
            {
                "prompt": pick(row, 3 + row % 5),
                "chosen": " " + pick(3 * row + 1, 2 + row % 6),
                "rejected": " " + pick(5 * row + 2, 9 - row % 6),
            }
            for row in range(rows)
        ]
    )


def unpaired_data(rows: int = 12) -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": row["prompt"], "completion": row[kind], "label": kind == "chosen"}
            for row in preference_data(rows)
            for kind in ("chosen", "rejected")
        ]
    )


def prompt_data(rows: int = 8) -> Dataset:
    return Dataset.from_list([{"prompt": row["prompt"]} for row in preference_data(rows)])


def length_reward(completions: list[str], **_: Any) -> list[float]:
    """Different for different completions, and exactly repeatable."""
    return [sum(ord(c) for c in text) % 17 / 17.0 for text in completions]
