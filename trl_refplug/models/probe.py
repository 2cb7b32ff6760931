"""
The probe: a few short rows of text, and what the declared reference says about them.

Whatever bends a reference on its way from the model that was passed in to the log-probs that training reads is visible
only to a check that takes another way. So the truth about the probe comes from the model itself, by its ordinary
`logits` and a log-softmax in float32 or better: no fused LM head, no packing, nothing of the scoring engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trl_refplug.models.causal_lm import causal_lm
from trl_refplug.models.modes import evaluation_mode
from trl_refplug.models.output_embedding import check_token_ids, vocabulary_sizes
from trl_refplug.provider import ReferenceBatch


ROWS = 3
TOKENS = 24
"""Tokens of a row. All rows are of one length, so that no padding comes into it."""

TEXT = (
    "The committee met on Tuesday to decide how the money should be spent. Some members wanted to repair the old "
    "bridge before winter; others asked why nobody had written down what it would cost. In the end they agreed on "
    "three things: to measure first, to publish the numbers, and to vote again in a month. A child could have told "
    "them so, said the mayor, and laughed."
)
"""What is asked about where a run has no text of its own at hand: ordinary prose, as a model has seen it before."""

Rows = NDArray[np.int64]
"""Token ids: int64 `[rows, tokens]`."""


@dataclass(frozen=True, eq=False)
class Probe:
    """
    What a reference says about the rows of the probe.

    Args:
        rows (`np.ndarray`): Token ids: int64 `[rows, tokens]`.
        log_probs (`Tensor`): float32 `[rows, tokens - 1]` on the CPU, in nats.
        origin (`str`): Who said so, for messages: "the policy as it was passed in", ...
    """

    rows: Rows
    log_probs: Tensor
    origin: str

    def difference(self, found: Tensor) -> tuple[float, float]:
        """How far other log-probs are from these, in nats per token: at most, and on average."""
        off = (found.double().cpu() - self.log_probs.double()).abs()
        return off.max().item(), off.mean().item()

    def difference_where_asked(self, other: Probe) -> tuple[float, float]:
        """The same between two probes, over the rows that they have in common; zeros if there is none."""
        pairs = [
            (mine, theirs)
            for mine, row in zip(self.log_probs, self.rows, strict=True)
            for theirs, asked in zip(other.log_probs, other.rows, strict=True)
            if np.array_equal(row, asked)
        ]
        if not pairs:
            return 0.0, 0.0
        mine, theirs = (torch.stack(answers) for answers in zip(*pairs, strict=True))
        return Probe(self.rows, mine, self.origin).difference(theirs)

    def to_dict(self) -> dict[str, Any]:
        """The probe as JSON-serializable values."""
        return {"rows": self.rows.tolist(), "log_probs": self.log_probs.tolist(), "origin": self.origin}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Probe:
        """The inverse of [`to_dict`]."""
        rows = np.array(values["rows"], np.int64)
        return cls(rows, torch.tensor(values["log_probs"], dtype=torch.float32), values["origin"])


def probe_batch(rows: Rows, device: torch.device | str = "cpu") -> ReferenceBatch:
    """The rows as a trainer would ask for them: every token but the first of a row is scored."""
    ids = torch.from_numpy(rows).to(device)
    return ReferenceBatch(ids, torch.ones_like(ids), ids.clone())


def probe_rows(model: nn.Module, tokenizer: Any = None, data: Any = None) -> Rows | None:
    """
    Rows that are text to `model`.

    One row is always the same text, so that runs on different data have it in common; the others are the beginning of
    the run's own data where that is at hand, or more of that text. Without a tokenizer the model writes the rows
    itself. Ids spread over the vocabulary would not do: between checkpoints of one model they move 14 to 18 times
    less than text does.

    Args:
        model (`nn.Module`): The policy.
        tokenizer (*optional*): Its tokenizer or processor.
        data (*optional*): The run's data set. Only one that can be indexed is read.

    Returns:
        `np.ndarray` or `None`: Token ids: int64 `[rows, tokens]`. `None` where there is no tokenizer and the model
        cannot run in this process as it is.
    """
    if tokenizer is not None:
        first = _ids(TEXT, tokenizer, model)
        own = _ids(" ".join(islice(_texts_of(data), 64)), tokenizer, model)
        more = own if len(own) >= TOKENS else first[TOKENS:]
        rows = _cut(first)[:1] + _cut(more)[: ROWS - 1]
        if rows:
            return np.array(rows, np.int64)
    return _written_by(model)


def ordinary_log_probs(model: nn.Module, rows: Rows, temperature: float) -> Tensor:
    """
    What `model` says about the rows, by its ordinary logits: float32 `[rows, tokens - 1]` on the CPU.

    Every module's mode, and the random streams, stay as they are.
    """
    check_token_ids(model, int(rows.max()), int(rows.max()))
    ids = torch.from_numpy(rows).to(_input_device(model))
    with torch.no_grad(), evaluation_mode(model):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    logits = logits[:, -ids.shape[1] :][:, :-1]  # virtual tokens of a prompt-learning adapter come first
    logits = logits if logits.dtype == torch.float64 else logits.float()
    log_probs: Tensor = (logits / temperature).log_softmax(-1)
    return log_probs.gather(-1, ids[:, 1:, None].to(logits.device))[..., 0].float().cpu()


def runs_alone(model: nn.Module) -> bool:
    """Whether this process can run `model` as it is now: it is neither sharded nor waiting for its weights."""
    return not any(hasattr(p, "ds_id") or isinstance(p, DTensor) or p.is_meta for p in model.parameters())


def _texts_of(data: Any) -> Iterator[str]:
    """The strings in the first rows of a data set that can be indexed, whatever its columns."""
    try:
        rows = [data[index] for index in range(min(4, len(data)))]
    except (TypeError, KeyError, IndexError, NotImplementedError):
        return iter(())
    return chain.from_iterable(map(_strings, rows))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        # Of a message the role is no text.
        yield from chain.from_iterable(_strings(part) for name, part in value.items() if name != "role")
    elif isinstance(value, list | tuple):
        yield from chain.from_iterable(map(_strings, value))


def _ids(text: str, tokenizer: Any, model: nn.Module) -> list[int]:
    """The token ids of `text` that the model knows."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor's
    try:
        ids: list[int] = tokenizer(text)["input_ids"]
    except (TypeError, ValueError, KeyError):
        return []
    size = min(vocabulary_sizes(model))
    return [token for token in ids if token < size]


def _cut(ids: list[int]) -> list[list[int]]:
    return [ids[start : start + TOKENS] for start in range(0, len(ids) - TOKENS + 1, TOKENS)]


def _written_by(model: nn.Module) -> Rows | None:
    """Rows that the model draws token by token, from a generator of its own."""
    if not runs_alone(model):
        return None
    generator = torch.Generator().manual_seed(0)
    device = _input_device(model)
    with torch.no_grad(), evaluation_mode(model):
        ids = torch.arange(1, ROWS + 1, device=device)[:, None]
        while ids.shape[1] < TOKENS:
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1].float().cpu()
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            ids = torch.cat([ids, drawn.to(device)], dim=1)
    rows: Rows = ids.cpu().numpy()
    return rows


def _input_device(model: nn.Module) -> torch.device:
    device: torch.device = causal_lm(model).get_input_embeddings().weight.device
    return device
