"""
The LM head: log-probabilities of target tokens from the hidden states that predict them.

Logits of the whole vocabulary are never in memory. They are computed tile by tile, some positions by some tokens.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


TILE_ROWS = 1024
TILE_COLUMNS = 2048
"""The size of a tile of logits on a CPU. It should fit into the processor's cache."""


@dataclass(frozen=True)
class Head:
    """
    What a model does to its last hidden states, besides the projection, to get log-probabilities.

    Args:
        scale (`float`): First, logits are multiplied by this.
        softcap (`float` or `None`): Then they become `softcap * tanh(logits / softcap)`.
        temperature (`float`): Then they are divided by this.
        float32 (`bool`): Whether hidden states are projected in float32, without autocast.
    """

    scale: float
    softcap: float | None
    temperature: float
    float32: bool

    @classmethod
    def from_model(cls, model: PreTrainedModel, temperature: float, float32: bool) -> Head:
        """Read the scale and the soft cap from the configuration of `model`, under the names that TRL knows."""
        config = model.config.get_text_config()
        names = ("logit_scale", "output_multiplier", "lm_head_multiplier")
        scale: Any = next((v for name in names if (v := getattr(config, name, None)) is not None), None)
        scaling = getattr(config, "logits_scaling", None)
        if scale is None and scaling is not None:
            scale = scaling if config.model_type == "hyperclovax" else 1 / scaling
        return cls(
            scale=1.0 if scale is None else float(scale),
            softcap=getattr(config, "final_logit_softcapping", None),
            temperature=temperature,
            float32=float32,
        )

    def log_probs(self, hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """
        Compute the log-probability of one target token per hidden state.

        Args:
            hidden (`Tensor`): `[scored, hidden]`, the hidden states.
            targets (`Tensor`): int64 `[scored]`, the token ids.
            weight (`Tensor`): `[vocab, hidden]`, the weight of the LM head.
            bias (`Tensor` or `None`): `[vocab]`, the bias of the LM head.

        Returns:
            `Tensor`: float32 `[scored]` (float64 where hidden states are projected in float64).
        """
        hidden, targets = hidden.to(weight.device), targets.to(weight.device)
        device = hidden.device.type
        if self.float32:
            hidden = hidden.float()
        with torch.autocast(device, enabled=False) if self.float32 else nullcontext():
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
            if device == "cpu":
                return self._tiled(hidden.to(dtype), targets, weight, bias)
            return self._fused(hidden, targets, weight, bias)

    def _fused(self, hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        from trl.kernels import ChunkedLogProbFunction

        answer = ChunkedLogProbFunction.apply(
            hidden, weight, bias, targets, self.temperature, 32768, self.softcap, self.scale, ()
        )
        return answer[0]  # type: ignore[no-any-return]

    def _tiled(self, hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # With the vocabulary in the outer loop the weights would be read only once, but a tile with all rows would not
        # fit into the cache
        spans = [slice(start, start + TILE_ROWS) for start in range(0, len(hidden), TILE_ROWS)]
        return torch.cat([self._tiled_rows(hidden[span], targets[span], weight, bias) for span in spans])

    def _tiled_rows(self, hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        vocab = weight.shape[0]
        buffer = hidden.new_empty(len(hidden), min(TILE_COLUMNS, vocab))
        maxima, sums = [], []
        target_logits = hidden.new_zeros(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        for start in range(0, vocab, TILE_COLUMNS):
            stop = min(start + TILE_COLUMNS, vocab)
            tile = buffer[:, : stop - start]
            torch.mm(hidden, weight[start:stop].to(hidden.dtype).t(), out=tile)
            if bias is not None:
                tile += bias[start:stop].to(hidden.dtype)
            logits = self._transform(tile.to(target_logits.dtype))
            inside = (targets >= start) & (targets < stop)
            found = logits.gather(1, (targets - start).clamp(0, stop - start - 1).unsqueeze(1)).squeeze(1)
            target_logits = torch.where(inside, found, target_logits)
            maxima.append(logits.amax(1))
            sums.append(logits.sub_(maxima[-1].unsqueeze(1)).exp_().sum(1))
        return target_logits - torch.logsumexp(torch.stack(maxima) + torch.stack(sums).log_(), 0)

    def _transform(self, logits: Tensor) -> Tensor:
        """Turn raw logits into those whose softmax is the distribution. Changes the tensor in place."""
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.temperature != 1.0:
            logits /= self.temperature
        return logits
