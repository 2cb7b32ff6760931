"""
How far two correct ways to compute the same log-probabilities may differ.
"""

from __future__ import annotations

import torch
from torch import Tensor


TOLERANCE = {
    torch.float64: (1e-5, 1e-6),
    torch.float32: (5e-4, 5e-5),
    torch.float16: (0.25, 0.0125),
    torch.bfloat16: (1.0, 0.1),
}
"""By dtype of the model's computation: most nats by which one token, and the mean over tokens, may differ."""


def disagreement(found: Tensor, expected: Tensor, dtype: torch.dtype) -> str | None:
    """Why two lists of log-probabilities, computed in `dtype`, are not the same up to rounding; `None` if they are."""
    if not expected.isfinite().any():
        return "log-probs of the exact call that are not finite: there is nothing to compare with"
    same = (found == expected) | (found.isnan() & expected.isnan())  # infinity less infinity is not a number
    differences = (found.double() - expected.double()).abs().masked_fill_(same, 0.0)
    largest, mean = differences.max().item(), differences.mean().item()
    largest_allowed, mean_allowed = TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])
    if largest <= largest_allowed and mean <= mean_allowed:  # False for NaN
        return None
    return (
        f"log-probs that differ from the exact call's by up to {largest:.2g} nats, {mean:.2g} on average (allowed for "
        f"{str(dtype).removeprefix('torch.')}: {largest_allowed:g} and {mean_allowed:g})"
    )
