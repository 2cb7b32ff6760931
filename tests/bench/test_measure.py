"""What a run of the scoring benchmark measures, and the table of several."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.scoring.models import tiny
from tests.scoring.test_packable import LeakyLayer
from trl_refplug.bench.measure import Result, measure, measure_pass
from trl_refplug.bench.report import as_markdown
from trl_refplug.bench.workloads import Pair, workload
from trl_refplug.errors import ConfigurationError
from trl_refplug.scoring import ExactFallbackWarning


CPU = torch.device("cpu")


def pairs_of(*lengths):
    """Make a workload of pairs with prompts of these lengths."""
    rng = np.random.default_rng(0)
    tokens = lambda count: rng.integers(3, 60, count)  # noqa: E731
    return workload("pairs", [Pair(tokens(length), tokens(6), tokens(5)) for length in lengths], 1024)


@pytest.mark.filterwarnings("ignore::trl_refplug.scoring.ExactFallbackWarning")
def test_a_model_whose_packed_answers_are_not_trusted_is_refused():
    model = tiny("llama")
    model.model.layers[0].__class__ = LeakyLayer
    with pytest.raises(ConfigurationError, match="Nothing of shape 'pairs' can be packed, because of log-probs that"):
        next(measure(model, pairs_of(12), None, repeats=1))


def test_rows_that_were_not_packed_are_mentioned():
    model, work = tiny("mistral", sliding_window=16), pairs_of(5, 40, 8)
    with pytest.warns(ExactFallbackWarning):
        [run] = measure(model, work, None, repeats=1)
    assert "sliding window of 16" in run.fallback
    assert run.operations > 0
    result = Result.from_runs(model, work, [run, replace(run, fallback=None)])
    assert result.counted_ratio is None  # the operations of rows that were scored exactly are not counted
    assert result.efficiency is None
    table = as_markdown([result], "mistral", torch.float32)
    assert "x (-) | - of" in table
    assert "\n\npairs: some rows were scored exactly, not packed, because of rows longer than the sliding" in table


def test_if_all_rows_were_packed_nothing_is_mentioned():
    model, work = tiny("llama"), pairs_of(5, 40, 8)
    [run] = measure(model, work, None, repeats=1)
    result = Result.from_runs(model, work, [run])
    assert run.fallback is None
    assert result.counted_ratio > 1
    assert result.efficiency > 0
    assert "scored exactly" not in as_markdown([result], "llama", torch.float32)


def test_a_shape_with_fewer_runs_than_the_others_says_how_many():
    """The table is written after every run, so its last shape may not be finished."""
    model, work = tiny("llama"), pairs_of(5, 40, 8)
    runs = list(measure(model, work, None, repeats=2))
    finished, unfinished = (
        Result.from_runs(model, work, runs),
        replace(Result.from_runs(model, work, runs[:1]), shape="unshared"),
    )
    table = as_markdown([finished, unfinished], "llama", torch.float32)
    assert "Medians of 2 alternating runs" in table
    assert "| pairs, 6 |" in table
    assert "| unshared, 6 (1 run) |" in table


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process can be reset on Linux only")
def test_memory_that_earlier_work_has_freed_counts_when_it_is_used_again():
    pieces, size = 1000, 2**16  # such small pieces are not given back to the system one by one

    def work():
        kept = [torch.ones(size // 4) for _ in range(pieces)]
        return torch.stack([piece.sum() for piece in kept])

    keep = []
    for _ in range(2):
        kept = [torch.ones(size // 4) for _ in range(pieces)]
        keep.append(torch.ones(100))  # it is at the top of the heap, so the memory below it stays with the process
        del kept
        assert measure_pass(work, CPU).memory > 0.9 * pieces * size
