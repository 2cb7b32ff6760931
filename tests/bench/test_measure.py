"""What a run of the scoring benchmark measures."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.scoring.models import tiny
from tests.scoring.test_safety import LeakyLayer
from trl_refplug.bench.measure import Result, measure, measured
from trl_refplug.bench.report import as_markdown
from trl_refplug.bench.workloads import Pair, workload
from trl_refplug.errors import ConfigurationError
from trl_refplug.scoring import ExactFallbackWarning


CPU = torch.device("cpu")


def pairs_of(*lengths):
    """A workload of pairs with prompts of these lengths."""
    rng = np.random.default_rng(0)
    tokens = lambda count: rng.integers(3, 60, count)  # noqa: E731
    return workload("pairs", [Pair(tokens(length), tokens(6), tokens(5)) for length in lengths], 1024)


@pytest.mark.filterwarnings("ignore::trl_refplug.scoring.ExactFallbackWarning")
def test_a_model_whose_packed_answers_are_not_trusted_is_told():
    model = tiny("llama")
    model.model.layers[0].__class__ = LeakyLayer
    with pytest.raises(ConfigurationError, match="Nothing of shape 'pairs' can be packed, because of log-probs that"):
        next(measure(model, pairs_of(12), None, repeats=1))


def test_rows_that_were_not_packed_are_told():
    model, work = tiny("mistral", sliding_window=16), pairs_of(5, 40, 8)
    with pytest.warns(ExactFallbackWarning):
        [run] = measure(model, work, None, repeats=1)
    assert "sliding window of 16" in run.fallback
    assert run.operations > 0
    result = Result.of(model, work, [run, replace(run, fallback=None)])
    assert result.counted_ratio is None  # the operations of the exact passes are not known
    assert result.efficiency is None
    table = as_markdown([result], "mistral", torch.float32)
    assert "x (-) | - of" in table
    assert "\n\npairs: some rows were scored exactly, not packed, because of rows longer than the sliding" in table


def test_with_all_rows_packed_nothing_is_told():
    model, work = tiny("llama"), pairs_of(5, 40, 8)
    [run] = measure(model, work, None, repeats=1)
    result = Result.of(model, work, [run])
    assert run.fallback is None
    assert result.counted_ratio > 1
    assert result.efficiency > 0
    assert "scored exactly" not in as_markdown([result], "llama", torch.float32)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process can be reset on Linux only")
def test_memory_that_earlier_work_has_freed_is_not_had_for_nothing():
    pieces, size = 1000, 2**16  # too small to be given back one by one

    def work():
        kept = [torch.ones(size // 4) for _ in range(pieces)]
        return torch.stack([piece.sum() for piece in kept])

    keep = []
    for _ in range(2):
        kept = [torch.ones(size // 4) for _ in range(pieces)]
        keep.append(torch.ones(100))  # at the top of the heap, so that what is below stays with the process
        del kept
        assert measured(work, CPU).memory > 0.9 * pieces * size
