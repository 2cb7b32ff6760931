"""The precisions that commands load models in."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import torch


class Dtype(StrEnum):
    """Precisions of the weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"

    def of_torch(self) -> torch.dtype:
        """The same in torch, which is imported only now."""
        import torch

        return {Dtype.float32: torch.float32, Dtype.bfloat16: torch.bfloat16, Dtype.float16: torch.float16}[self]
