"""Tiny random policies, tokenizers, data sets and batches. All are made on the fly: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from trl_refplug.provider import ReferenceBatch


if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


_WORDS = "the cat sat on a warm mat and one small bird sang of rain why do leaves fall in autumn when days are short"
_SPECIAL = ("<pad>", "<unk>", "<eos>", "<image>")
_TEMPLATE = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %} {% endfor %}{% endif %}"
    "{% endfor %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word. It pads on the default side of `PreTrainedTokenizerFast`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*_SPECIAL, *sorted(set(_WORDS.split()))]
    base = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    base.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=base,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=["<image>"],
    )
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def tiny_policy(seed: int = 0) -> PreTrainedModel:
    """
    A random Llama of a few thousand float32 parameters for [`tiny_tokenizer`]. Its weights are large enough for
    log-probs to differ by whole nats, and it has dropout, so that scoring in train mode is noticed.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**_language_config()))


def _language_config() -> dict[str, Any]:
    vocabulary = tiny_tokenizer()
    return dict(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.4,
        attention_dropout=0.1,
        pad_token_id=vocabulary.pad_token_id,
        bos_token_id=vocabulary.eos_token_id,
        eos_token_id=vocabulary.eos_token_id,
    )


def preference_data(rows: int = 4) -> Dataset:
    """Preference pairs of different lengths, in TRL's columns `prompt`, `chosen`, `rejected`."""
    from datasets import Dataset

    words = _WORDS.split()

    def text(start: int, count: int) -> str:
        return " ".join(words[(start + offset) % len(words)] for offset in range(count))

    return Dataset.from_list(
        [
            {
                "prompt": text(row, 2 + row % 3),
                "chosen": " " + text(3 * row + 1, 3 + row % 4),
                "rejected": " " + text(5 * row + 2, 6 - row % 4),
            }
            for row in range(rows)
        ]
    )


# Batches


@dataclass(frozen=True)
class SampleRow:
    """
    The tokens of one sequence, without padding.

    Args:
        tokens (`tuple[int, ...]`): The token ids of the prompt and the completion.
        prompt (`int`): How many of them belong to the prompt, which is not scored.
    """

    tokens: tuple[int, ...]
    prompt: int


def sample_rows(vocabulary: int) -> list[SampleRow]:
    """
    Four rows with a prompt and a completion each, of different lengths, the longest first. Ids are below `vocabulary`.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = ((12, 3), (9, 4), (7, 1), (5, 2))
    first = len(_SPECIAL)
    return [
        SampleRow(tuple(torch.randint(first, vocabulary, (length,), generator=generator).tolist()), prompt)
        for length, prompt in lengths
    ]


def make_batch(
    rows: Sequence[SampleRow], *, padding: Literal["left", "right"] = "right", pad_token_id: int = 0
) -> ReferenceBatch:
    """The rows as a trainer collates them: int64 `[rows, longest]`, with the label -100 on prompts and padding."""
    width = max(len(row.tokens) for row in rows)
    input_ids = torch.full((len(rows), width), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, -100)
    for line, row in enumerate(rows):
        start = width - len(row.tokens) if padding == "left" else 0
        end = start + len(row.tokens)
        input_ids[line, start:end] = torch.tensor(row.tokens)
        attention_mask[line, start:end] = 1
        labels[line, start + row.prompt : end] = input_ids[line, start + row.prompt : end]
    return ReferenceBatch(input_ids, attention_mask, labels)


def scored(batch: ReferenceBatch) -> Tensor:
    """The mask of the answer's entries that are scored: bool `[batch, seq - 1]`."""
    return batch.labels[:, 1:] != -100


# The plain model


def plain_log_probs(policy: Any, batch: ReferenceBatch, temperature: float = 1.0) -> Tensor:
    """
    The log-prob of every next token, computed by transformers alone, without trl-refplug or TRL, in float64:
    `[batch, seq - 1]`. It works on a copy of the model, in evaluation mode.
    """
    import copy

    model = copy.deepcopy(policy).double().eval()
    extras = {
        name: value.double() if torch.is_floating_point(value) else value for name, value in batch.extras.items()
    }
    with torch.no_grad():
        logits = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **extras
        ).logits
    log_probs = torch.log_softmax(logits[:, :-1] / temperature, dim=-1)
    return log_probs.gather(2, batch.input_ids[:, 1:, None]).squeeze(2)


# With images


def tiny_image_policy(seed: int = 0) -> PreTrainedModel:
    """A random Llava for [`tiny_image_processor`]."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=16,
        initializer_range=0.4,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**_language_config()),
        image_token_index=tiny_tokenizer().convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return LlavaForConditionalGeneration(config)


def tiny_image_processor() -> Any:
    """A processor for images of 16 by 16 pixels, which become four tokens. Needs Pillow."""
    import transformers
    from transformers import LlavaProcessor

    # Since transformers 5.4, CLIPImageProcessor needs torchvision.
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    images = kind(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return LlavaProcessor(
        images,
        tiny_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=_TEMPLATE,
        num_additional_image_tokens=1,
    )


def image_preference_data(rows: int = 4) -> Dataset:
    """The pairs of [`preference_data`] as conversations about an image."""
    import numpy as np
    from datasets import Dataset
    from PIL import Image

    generator = np.random.default_rng(0)
    return Dataset.from_list(
        [
            {
                "image": Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)),
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "chosen": [{"role": "assistant", "content": row["chosen"]}],
                "rejected": [{"role": "assistant", "content": row["rejected"]}],
            }
            for row in preference_data(rows)
        ]
    )
