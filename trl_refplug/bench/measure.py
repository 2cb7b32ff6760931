"""
Times TRL's way to score rows against packed scoring: the same model and rows, in one process.

The two ways take turns in being the first.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from trl_refplug.bench.workloads import Workload
from trl_refplug.errors import ConfigurationError
from trl_refplug.models.causal_lm import causal_lm
from trl_refplug.rows import PaddedRows, Row
from trl_refplug.runtime.memory import peak_resident_set
from trl_refplug.scoring import Scorer, count_operations, exact_log_probs


@dataclass(frozen=True)
class Run:
    """
    One pass over the rows with TRL's way, and one with packed scoring.

    Args:
        trl_seconds, seconds (`float`): Time of TRL's pass and of the packed pass.
        trl_memory, memory (`int`): Peak bytes of these passes, above what was in use before each.
        unique_tokens, scored_tokens (`int`): Tokens that the packed pass puts through the model and the LM head.
        operations (`float`): Counted operations of the packed pass, without those of rows that were not packed.
        difference (`float`): Largest difference between the two sums of a row, in nats. Sums are computed in float64.
        matmul_rate (`float`): Operations per second of a large matrix product, measured after the passes.
        fallback (`str`, *optional*): Why some rows of the packed pass were not packed but scored exactly.
    """

    trl_seconds: float
    seconds: float
    trl_memory: int
    memory: int
    unique_tokens: int
    scored_tokens: int
    operations: float
    difference: float
    matmul_rate: float
    fallback: str | None = None

    def __str__(self) -> str:
        return (
            f"TRL {self.trl_seconds:.1f} s, packed {self.seconds:.1f} s, {self.trl_seconds / self.seconds:.2f}x, "
            f"matmul {self.matmul_rate / 1e9:.0f} GFLOP/s"
        )


@dataclass(frozen=True)
class Result:
    """
    A workload and its runs. Seconds and rates are medians over the runs.

    Args:
        shape (`str`): The shape of the workload.
        rows (`int`): Number of rows.
        trl_tokens (`int`): Number of tokens in TRL's padded batches. TRL puts all of them through the LM head.
        trl_operations (`float`): Counted operations of TRL's pass.
        runs (`list[Run]`): The runs so far. The medians need at least one.
    """

    shape: str
    rows: int
    trl_tokens: int
    trl_operations: float
    runs: list[Run]

    @classmethod
    def from_runs(cls, model: Any, workload: Workload, runs: list[Run]) -> Result:
        """Make the result of a workload from its runs."""
        cost = count_operations(causal_lm(model))
        sizes = [(len(batch), max(len(workload.rows[index]) for index in batch)) for batch in workload.batches]
        return cls(
            shape=workload.shape,
            rows=len(workload.rows),
            trl_tokens=sum(rows * columns for rows, columns in sizes),
            trl_operations=sum(rows * (cost.span(0, columns) + columns * cost.head) for rows, columns in sizes),
            runs=runs,
        )

    @property
    def trl_seconds(self) -> float:
        return statistics.median(run.trl_seconds for run in self.runs)

    @property
    def seconds(self) -> float:
        return statistics.median(run.seconds for run in self.runs)

    @property
    def matmul_rate(self) -> float:
        return statistics.median(run.matmul_rate for run in self.runs)

    @property
    def ratio(self) -> float:
        """How many times faster packed scoring is than TRL's way."""
        return self.trl_seconds / self.seconds

    @property
    def fallback(self) -> str | None:
        """Why some rows were not packed but scored exactly. `None` if all rows were packed."""
        return next((run.fallback for run in self.runs if run.fallback), None)

    @property
    def counted_ratio(self) -> float | None:
        """
        TRL's counted operations divided by those of packed scoring.

        This would be the speed-up if both had the same efficiency. It is `None` if not all rows were packed.
        """
        return None if self.fallback else self.trl_operations / self.runs[-1].operations

    @property
    def efficiency(self) -> float | None:
        """Counted operations per second as a share of the matmul rate. `None` if not all rows were packed."""
        return None if self.fallback else self.runs[-1].operations / self.seconds / self.matmul_rate


def measure(model: Any, workload: Workload, token_budget: int | None, repeats: int) -> Iterator[Run]:
    """
    Time both ways to score a workload, after a short pass to warm up. Every other run begins with packed scoring.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model, in evaluation mode.
        workload (`Workload`): The rows to score.
        token_budget (`int`, *optional*): The packed scorer's token budget, as in [`Scorer`].
        repeats (`int`): Number of runs.

    Yields:
        `Run`: Each run, as soon as it is finished.

    Raises:
        ConfigurationError: Rows cannot be packed with this model.
    """
    scorer = Scorer(model, mode="packed", token_budget=token_budget)
    scored = [row for row in workload.rows if len(row.scored)]
    list(scorer.score_rows([min(scored, key=len)]))  # this also verifies packed scoring, outside the time
    if not scorer.stats.operations:
        raise ConfigurationError(
            f"Nothing of shape {workload.shape!r} can be packed, because of {scorer.stats.fallback}, so there is "
            "nothing to compare with TRL's way. Use another --model."
        )
    device = causal_lm(model).get_input_embeddings().weight.device
    ways: dict[str, Callable[[tqdm], Tensor]] = {
        "TRL's way": lambda bar: score_like_trl(model, workload, device, bar),
        "packed": lambda bar: _score_packed(scorer, workload.rows, bar),
    }
    for number in range(1, repeats + 1):
        scorer.stats.clear()
        passes = {}
        for way in ways if number % 2 else reversed(ways):
            title = f"{workload.shape}, run {number} of {repeats}, {way}"
            with tqdm(total=len(workload.rows), desc=title, unit="row", leave=False) as bar:
                passes[way] = measure_pass(partial(ways[way], bar), device)
        trl, ours = passes["TRL's way"], passes["packed"]
        yield Run(
            trl_seconds=trl.seconds,
            seconds=ours.seconds,
            trl_memory=trl.memory,
            memory=ours.memory,
            unique_tokens=scorer.stats.unique_tokens,
            scored_tokens=scorer.stats.scored_tokens,
            operations=scorer.stats.operations,
            difference=(ours.sums - trl.sums).abs().max().item(),
            matmul_rate=matmul_rate(device, next(causal_lm(model).parameters()).dtype),
            fallback=scorer.stats.fallback,
        )


def score_like_trl(model: Any, workload: Workload, device: torch.device, bar: tqdm) -> Tensor:
    """
    Score as TRL's precompute does: in batches in the order of the data set, padded on the right.

    Returns the sum of each row's log-probs.
    """
    sums = torch.zeros(len(workload.rows), dtype=torch.float64)
    for indices in workload.batches:
        batch = PaddedRows.flush_left([workload.rows[index] for index in indices]).to_batch(device)
        sums[indices] = exact_log_probs(model, batch).double().sum(1).cpu()
        bar.update(len(indices))
    return sums


def _score_packed(scorer: Scorer, rows: Sequence[Row], bar: tqdm) -> Tensor:
    sums = torch.zeros(len(rows), dtype=torch.float64)
    for answers in scorer.score_passes(rows):
        for index, log_probs in answers:
            sums[index] = log_probs.double().sum()
        bar.update(len(answers))  # once for each forward pass, so its cost is negligible
    return sums


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a square matrix product. This is the median over half a second of products."""
    size = 2048 if device.type == "cpu" else 8192
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    rates: list[float] = []
    stop = time.perf_counter() + 0.5
    while time.perf_counter() < stop or len(rates) < 3:
        _, seconds = _timed(lambda: left @ right, device)
        rates.append(2 * size**3 / seconds)
    return statistics.median(rates)


@dataclass(frozen=True)
class Measured:
    """
    A measured pass over the rows.

    Args:
        sums (`Tensor`): The sum of each row's log-probs, float64 `[rows]`.
        seconds (`float`): The time that the pass took.
        memory (`int`): Peak bytes, above what was in use before the pass.
    """

    sums: Tensor
    seconds: float
    memory: int


def measure_pass(work: Callable[[], Tensor], device: torch.device) -> Measured:
    """Do the work of one pass, and measure the time and the memory that it takes."""
    before = _reset_peak(device)
    sums, seconds = _timed(work, device)
    return Measured(sums, seconds, _peak(device) - before)


def _timed(work: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start


def _reset_peak(device: torch.device) -> int:
    """Set the peak memory to what is in use now. Returns the bytes in use."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if sys.platform == "linux":
        with suppress(AttributeError):  # other C libraries than glibc do not have it
            # Memory that earlier work has freed would otherwise be reused, and would not count as used by this pass.
            ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # on Linux, this sets the peak to what is in use
    return _peak(device)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
    except (OSError, StopIteration):
        return peak_resident_set()
