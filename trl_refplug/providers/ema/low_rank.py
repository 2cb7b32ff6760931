"""Matrices that are kept as two thin factors: they are summed and recompressed, and never formed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch


if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def full_float32() -> Iterator[None]:
    """Multiply float32 matrices in float32, even where training uses TF32, whose 10 bits are too few here."""
    everywhere: Any = torch.backends
    matmul = everywhere.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = "none" if before == everywhere.fp32_precision else before  # it was inherited


def _double(tensor: Tensor) -> Tensor:
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()  # MPS knows no float64


@dataclass(frozen=True)
class LowRank:
    """
    The matrix `left @ right`.

    Args:
        left (`Tensor`): `[rows, rank]`.
        right (`Tensor`): `[rank, columns]`, same dtype.
    """

    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        """The number of columns of `left`. The rank of the matrix itself may be lower."""
        return self.left.shape[1]

    def norm(self) -> float:
        """Return the Frobenius norm."""
        left, right = _double(self.left), _double(self.right)
        squared = ((left.T @ left) * (right @ right.T)).sum()
        return float(squared.clamp(min=0).sqrt())

    @full_float32()
    def row_norms(self, weight: Tensor) -> Tensor:
        """
        Return the Euclidean norm of every row of `weight + left @ right`.

        Args:
            weight (`Tensor`): `[rows, columns]`.

        Returns:
            `Tensor`: `[rows]`, at least float32.
        """
        weight = weight.to(self.left.dtype)
        squared: Tensor = torch.linalg.vector_norm(weight, dim=1).square()
        squared += 2 * ((weight @ self.right.T) * self.left).sum(dim=1)
        squared += ((self.left @ (self.right @ self.right.T)) * self.left).sum(dim=1)
        return squared.clamp(min=0).sqrt()

    @full_float32()
    def recompressed(self, tolerance: float, max_rank: int) -> Recompressed:
        """
        Return the same matrix with as low a rank as an error of `tolerance` allows, and at most `max_rank`.

        Args:
            tolerance (`float`): Frobenius norm of what may be left out, relative to that of the matrix.
            max_rank (`int`): The highest rank. If `tolerance` needs a higher one, more is left out than it allows.
        """
        orthogonal_left, upper_left = torch.linalg.qr(self.left)
        orthogonal_right, upper_right = torch.linalg.qr(self.right.T)
        u, singular, vh = torch.linalg.svd(upper_left @ upper_right.T, full_matrices=False)
        # tails[k] is the norm of what is left out if k singular values are kept.
        tails = singular.cpu().double().square().flip(0).cumsum(0).sqrt().flip(0)
        tails = torch.cat([tails, tails.new_zeros(1)])
        needed = int((tails > tolerance * tails[0]).sum())
        kept = min(needed, max_rank)
        root = singular[:kept].sqrt()
        matrix = LowRank(orthogonal_left @ (u[:, :kept] * root), (root[:, None] * vh[:kept]) @ orthogonal_right.T)
        return Recompressed(matrix, needed, float(tails[kept]), float(tails[0]))


@dataclass(frozen=True)
class Recompressed:
    """
    The result of a recompression.

    Args:
        matrix ([`LowRank`]): The matrix, of lower rank.
        needed (`int`): The rank that the tolerance needs.
        left_out (`float`): Frobenius norm of the difference to the matrix before.
        norm (`float`): Frobenius norm of the matrix before it was recompressed.
    """

    matrix: LowRank
    needed: int
    left_out: float
    norm: float


def weighted_sum(terms: Sequence[tuple[float, LowRank]]) -> LowRank:
    """Return `sum(weight * matrix)`, whose rank is the sum of the ranks."""
    left = torch.cat([weight * matrix.left for weight, matrix in terms], dim=1)
    return LowRank(left, torch.cat([matrix.right for _, matrix in terms]))
