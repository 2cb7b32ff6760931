"""How far two right answers about the same tokens may be apart, and no further."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tolerance:
    """
    Largest difference, in nats per token, between two right answers.

    Args:
        largest (`float`): Of any single token.
        mean (`float`): Of the mean over the scored tokens.
    """

    largest: float
    mean: float


# Two right answers differ by rounding alone: other kernels, other batch shapes, another engine. Measured against a
# float64 run, a float32 engine of another make stays within 6e-5 per token; bfloat16 within 0.5 for single unlikely
# tokens, 6e-3 on average. A wrong reference (another revision, another template) is off by 0.1 and more on average.
TOLERANCES = {
    torch.float64: Tolerance(largest=1e-3, mean=1e-4),
    torch.float32: Tolerance(largest=1e-3, mean=1e-4),
    torch.float16: Tolerance(largest=0.25, mean=1e-2),
    torch.bfloat16: Tolerance(largest=1.0, mean=5e-2),
}

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What accelerate's `mixed_precision` computes in; anything else leaves the model's own dtype."""


def tolerance_for(mixed_precision: str, dtype: torch.dtype, device_type: str) -> Tolerance:
    """The tolerance of a model in `dtype` that runs under accelerate's `mixed_precision`."""
    rounded = as_precise_as(AUTOCAST_DTYPES.get(mixed_precision, dtype), device_type)
    return TOLERANCES.get(rounded, TOLERANCES[torch.bfloat16])


def as_precise_as(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """The dtype whose rounding errors a computation in `dtype` has."""
    if dtype == torch.float32 and rounds_float32(device_type):
        return torch.float16  # TF32 has its mantissa
    return dtype


def rounds_float32(device_type: str) -> bool:
    """
    Whether products of float32 matrices are computed in less (TF32), as `tf32=True` of the training arguments or
    `torch.set_float32_matmul_precision` asks for.
    """
    backend = {"cuda": torch.backends.cuda, "cpu": torch.backends.mkldnn}.get(device_type)
    return backend is not None and backend.matmul.fp32_precision not in ("none", "ieee")
