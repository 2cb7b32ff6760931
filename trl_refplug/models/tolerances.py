"""How far two correct answers for the same tokens may be apart, by the dtype that they were computed in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """
    The largest differences between two correct answers, in nats per token.

    Args:
        largest (`float`): Bound on the difference of any single token.
        mean (`float`): Bound on the mean of the differences over the scored tokens.
    """

    largest: float
    mean: float

    def allows(self, largest: float, mean: float) -> bool:
        """Whether differences of this size can be rounding. A NaN cannot."""
        return largest <= self.largest and mean <= self.mean


TOLERANCES = {
    torch.float64: Tolerance(largest=1e-5, mean=1e-6),
    torch.float32: Tolerance(largest=5e-4, mean=5e-5),
    torch.float16: Tolerance(largest=0.25, mean=1e-2),
    torch.bfloat16: Tolerance(largest=1.0, mean=5e-2),
}
"""
The tolerance for each dtype that a model can compute in. Two correct answers only differ by rounding: they were
computed by other kernels, in other batch shapes or by another engine. Measured against a float64 run, another engine
in float32 stays within 6e-5 nats per token; bfloat16 stays within 0.5 for single unlikely tokens and within 6e-3 on
average. A wrong reference (another revision, another chat template) differs by 0.1 and more on average.
"""

PACKING_TOLERANCES = {
    **TOLERANCES,
    torch.float16: Tolerance(largest=0.25, mean=0.0125),
    torch.bfloat16: Tolerance(largest=1.0, mean=0.1),
}
"""
The tolerances when packed answers are verified against exact ones. The rows of that comparison are spliced together
from real ones, so their tokens are less likely, and unlikely tokens are rounded more: a sound model of 135 million
parameters differs by 0.055 nats on average in bfloat16, which [`TOLERANCES`] would not allow.
"""

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtype that each `mixed_precision` of accelerate computes in. Any other value leaves the model's own dtype."""


def tolerance_for(mixed_precision: str, dtype: torch.dtype, device_type: str) -> Tolerance:
    """The tolerance for a model with weights in `dtype` that runs under accelerate's `mixed_precision`."""
    return tolerance_of(rounding_dtype(AUTOCAST_DTYPES.get(mixed_precision, dtype), device_type))


def tolerance_of(dtype: torch.dtype) -> Tolerance:
    """The tolerance for values that were computed in `dtype`. A dtype that is not in the table counts as bfloat16."""
    return TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16])


def rounding_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """The dtype whose rounding errors a computation in `dtype` has: float16 for float32 where TF32 is on."""
    if dtype == torch.float32 and rounds_float32(device_type):
        return torch.float16  # the mantissa of TF32 is as long as that of float16
    return dtype


def rounds_float32(device_type: str) -> bool:
    """
    Whether float32 matrices are multiplied in a lower precision (TF32). Training arguments ask for it with
    `tf32=True`, and other code with `torch.set_float32_matmul_precision`.
    """
    backend = {"cuda": torch.backends.cuda, "cpu": torch.backends.mkldnn}.get(device_type)
    return backend is not None and backend.matmul.fp32_precision not in ("none", "ieee")


def disagreement(found: Tensor, expected: Tensor, dtype: torch.dtype) -> str | None:
    """
    Compare packed with exact log-probabilities, both computed in `dtype`, by [`PACKING_TOLERANCES`].

    Args:
        found (`Tensor`): `[scored]`, the packed ones.
        expected (`Tensor`): `[scored]`, the exact ones.
        dtype (`torch.dtype`): The dtype of the computation, not of these tensors.

    Returns:
        `str` or `None`: Why they differ by more than rounding, as a phrase that completes "because of"; `None` if they
        do not.
    """
    if not expected.isfinite().any():
        return "log-probs of the exact call that are not finite: there is nothing to compare with"
    same = (found == expected) | (found.isnan() & expected.isnan())  # infinity minus infinity would be NaN
    differences = (found.double() - expected.double()).abs().masked_fill_(same, 0.0)
    largest, mean = differences.max().item(), differences.mean().item()
    allowed = PACKING_TOLERANCES.get(dtype, PACKING_TOLERANCES[torch.bfloat16])
    if allowed.allows(largest, mean):
        return None
    return (
        f"log-probs that differ from the exact call's by up to {largest:.2g} nats, {mean:.2g} on average (allowed for "
        f"{str(dtype).removeprefix('torch.')}: {allowed.largest:g} and {allowed.mean:g})"
    )
