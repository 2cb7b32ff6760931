"""
The probe: a few short rows of text, and what the declared reference says about them.

Many things can make a reference wrong between the model that was passed in and the log-probs that training reads. They
can be noticed only by a check that computes the log-probs in another way. So the expected answers to the probe come
from the model itself: its ordinary `logits` and a log-softmax in float32 or better, without a fused LM head, packing,
or anything else of the scoring engine.
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

from trl_refplug.models.causal_lm import causal_lm
from trl_refplug.models.modes import evaluation_mode
from trl_refplug.models.output_embedding import check_token_ids, vocabulary_sizes
from trl_refplug.models.sharding import is_sharded
from trl_refplug.provider import ReferenceBatch


ROWS = 3
TOKENS = 24
"""How many tokens a row has. All rows have the same length, so that no padding is needed."""

TEXT = (
    "The committee met on Tuesday to decide how the money should be spent. Some members wanted to repair the old "
    "bridge before winter; others asked why nobody had written down what it would cost. In the end they agreed on "
    "three things: to measure first, to publish the numbers, and to vote again in a month. A child could have told "
    "them so, said the mayor, and laughed."
)
"""The text to ask about if the run has no text of its own at hand: ordinary prose, of a kind that models know."""

Rows = NDArray[np.int64]
"""Token ids: int64 `[rows, tokens]`."""


@dataclass(frozen=True, eq=False)
class Probe:
    """
    A reference's answers to the probe.

    Args:
        rows (`np.ndarray`): Token ids: int64 `[rows, tokens]`.
        log_probs (`Tensor`): float32 `[rows, tokens - 1]` on the CPU, in nats.
        origin (`str`): Where the answers come from, for messages: "the policy as it was passed in", ...
    """

    rows: Rows
    log_probs: Tensor
    origin: str

    def difference(self, found: Tensor) -> tuple[float, float]:
        """The largest and the mean difference between `found` and these log-probs, in nats per token."""
        off = (found.double().cpu() - self.log_probs.double()).abs()
        return off.max().item(), off.mean().item()

    def difference_where_asked(self, other: Probe) -> tuple[float, float]:
        """The same differences between two probes, over the rows that both have; zeros if they have none in common."""
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
    """The rows as a batch like those of a trainer. All tokens are scored but the first of each row."""
    ids = torch.from_numpy(rows).to(device)
    return ReferenceBatch(ids, torch.ones_like(ids), ids.clone())


def probe_rows(model: nn.Module, tokenizer: Any = None, data: Any = None) -> Rows | None:
    """
    Choose the rows of the probe. To `model` they are ordinary text.

    The first row is always the beginning of [`TEXT`], so that runs on different data have it in common. The others are
    the beginning of the run's own data if that can be read, and otherwise more of `TEXT`. Without a tokenizer, the
    model writes the rows itself. Random ids would not do: between two checkpoints of a model, their log-probs change
    14 to 18 times less than those of text.

    Args:
        model (`nn.Module`): The policy.
        tokenizer (*optional*): Its tokenizer or processor.
        data (*optional*): The run's data set. It is read only if it can be indexed.

    Returns:
        `np.ndarray` or `None`: Token ids: int64 `[rows, tokens]`. `None` if there is no tokenizer, and the model
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
    The log-probs of the rows by `model`'s ordinary logits: float32 `[rows, tokens - 1]` on the CPU.

    Every module's mode, and the random streams, stay as they are.
    """
    check_token_ids(model, int(rows.max()), int(rows.max()))
    ids = torch.from_numpy(rows).to(_input_device(model))
    with torch.no_grad(), evaluation_mode(model):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    # The virtual tokens of a prompt-learning adapter come first, and are cut off.
    logits = logits[:, -ids.shape[1] :][:, :-1]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    log_probs: Tensor = (logits / temperature).log_softmax(-1)
    return log_probs.gather(-1, ids[:, 1:, None].to(logits.device))[..., 0].float().cpu()


def runs_alone(model: nn.Module) -> bool:
    """Whether this process can run `model` by itself: it is not sharded, and none of its weights is missing."""
    return not any(is_sharded(p) or p.is_meta for p in model.parameters())


def _texts_of(data: Any) -> Iterator[str]:
    """All strings in the first rows of a data set, whatever its columns; none if it cannot be indexed."""
    try:
        rows = [data[index] for index in range(min(4, len(data)))]
    except (TypeError, KeyError, IndexError, NotImplementedError):
        return iter(())
    return chain.from_iterable(map(_strings, rows))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        # The role of a message is not part of its text.
        yield from chain.from_iterable(_strings(part) for name, part in value.items() if name != "role")
    elif isinstance(value, list | tuple):
        yield from chain.from_iterable(map(_strings, value))


def _ids(text: str, tokenizer: Any, model: nn.Module) -> list[int]:
    """The token ids of `text`, without those that the model has no embedding for."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor has its tokenizer inside
    try:
        ids: list[int] = tokenizer(text)["input_ids"]
    except (TypeError, ValueError, KeyError):
        return []
    size = min(vocabulary_sizes(model))
    return [token for token in ids if token < size]


def _cut(ids: list[int]) -> list[list[int]]:
    return [ids[start : start + TOKENS] for start in range(0, len(ids) - TOKENS + 1, TOKENS)]


def _written_by(model: nn.Module) -> Rows | None:
    """Rows that the model writes token by token. They are sampled with a generator of their own."""
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
