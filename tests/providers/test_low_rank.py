"""Sums, norms and recompressions of thin factors are those of the matrices that the factors make."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_refplug.providers.ema.low_rank import LowRank, weighted_sum


def random(rows, columns, rank, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(rows, rank, generator=generator, dtype=dtype),
        torch.randn(rank, columns, generator=generator, dtype=dtype),
    )


def dense(matrix):
    return (matrix.left @ matrix.right).double()


shapes = st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(0, 25), st.integers(0, 99))


@given(shapes, st.floats(-2, 2), st.floats(-2, 2))
def test_weighted_sum(shape, first, second):
    rows, columns, rank, seed = shape
    one, other = random(rows, columns, rank, seed), random(rows, columns, 3, seed + 1)
    torch.testing.assert_close(
        dense(weighted_sum([(first, one), (second, other)])), first * dense(one) + second * dense(other)
    )


@given(shapes)
def test_norms(shape):
    rows, columns, rank, seed = shape
    matrix = random(rows, columns, rank, seed)
    weight = dense(random(rows, columns, 2, seed + 1))
    assert matrix.norm() == pytest.approx(float(dense(matrix).norm()), abs=1e-9)
    torch.testing.assert_close(matrix.row_norms(weight), (weight + dense(matrix)).norm(dim=1), atol=1e-6, rtol=1e-6)


@settings(max_examples=200)
@given(shapes, st.sampled_from([0.0, 1e-6, 1e-2, 0.3, 0.9]), st.integers(1, 30))
def test_recompression_leaves_out_what_it_says(shape, tolerance, max_rank):
    rows, columns, rank, seed = shape
    matrix = random(rows, columns, rank, seed)
    smaller = matrix.recompressed(tolerance, max_rank)
    left_out = float((dense(matrix) - dense(smaller.matrix)).norm())
    norm = float(dense(matrix).norm())
    assert smaller.matrix.rank == min(smaller.needed, max_rank)
    assert smaller.norm == pytest.approx(norm, rel=1e-9)
    assert smaller.left_out == pytest.approx(left_out, abs=1e-9 * max(norm, 1))
    if smaller.needed <= max_rank:
        assert left_out <= tolerance * norm + 1e-9 * max(norm, 1)
    if smaller.needed > 1:  # one rank less would leave out too much
        assert matrix.recompressed(0.0, smaller.needed - 1).left_out > tolerance * norm


def test_rank_is_that_of_the_matrix():
    """The factors may have a higher rank than the matrix that they make."""
    narrow = random(30, 20, 3, 0)
    wide = weighted_sum([(0.5, narrow), (0.25, narrow), (0.25, narrow)])
    assert wide.rank == 9
    smaller = wide.recompressed(1e-10, 20).matrix
    assert smaller.rank == 3
    torch.testing.assert_close(dense(smaller), dense(narrow))


def test_zero():
    zero = LowRank(torch.zeros(4, 2), torch.ones(2, 3))
    smaller = zero.recompressed(1e-4, 2)
    assert (smaller.matrix.rank, smaller.left_out, smaller.norm) == (0, 0.0, 0.0)


def test_tf32_is_not_for_averages(monkeypatch):
    matmul, svd, during = torch.backends.cuda.matmul, torch.linalg.svd, []

    def watched(*args, **kwargs):
        during.append(matmul.fp32_precision)
        return svd(*args, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", watched)
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        random(5, 6, 3, 0).recompressed(1e-4, 3)
        assert during == ["ieee"]
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before
