"""
Log-probabilities of target tokens from the hidden states that predict them, never holding more than a tile of logits.
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
"""Size of a tile of logits where no fused kernel is available: it should fit the processor's cache."""


@dataclass(frozen=True)
class Head:
    """
    What a model does between its last hidden state and its log-probabilities.

    Args:
        scale (`float`): Logits are multiplied by this first.
        softcap (`float` or `None`): Then `softcap * tanh(logits / softcap)`.
        temperature (`float`): Then divided by this.
        float32 (`bool`): Project in float32, outside autocast.
    """

    scale: float
    softcap: float | None
    temperature: float
    float32: bool

    @classmethod
    def of(cls, model: PreTrainedModel, temperature: float, float32: bool) -> Head:
        """Read the quirks of `model` from its configuration, under the names that TRL knows."""
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
        Args:
            hidden (`Tensor`): `[scored, hidden]`.
            targets (`Tensor`): int64 `[scored]`.
            weight, bias (`Tensor`): `[vocab, hidden]` and `[vocab]` of the LM head.

        Returns:
            `Tensor`: `[scored]`, float32 (float64 where the projection is).
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
        # Vocabulary in the outer loop would read the weights once, but a tile of all rows would leave the cache
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
        """In place: the tile belongs to us."""
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.temperature != 1.0:
            logits /= self.temperature
        return logits
