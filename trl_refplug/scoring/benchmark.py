"""
TRL's way to score rows against the packed one: same model, same rows, one process, alternating.
"""

from __future__ import annotations

import platform
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trl_refplug.scoring.exact import exact_log_probs, pad_rows
from trl_refplug.scoring.execution import causal_lm
from trl_refplug.scoring.operations import count_operations
from trl_refplug.scoring.rows import Row
from trl_refplug.scoring.scorer import Scorer
from trl_refplug.scoring.workloads import Workload


@dataclass(frozen=True)
class Result:
    """
    One workload, both ways. Seconds have one entry a repetition.

    Args:
        trl_tokens (`int`): Tokens in TRL's padded batches; it projects each of them through the LM head.
        tokens (`int`): Tokens of the rows themselves.
        unique_tokens (`int`), scored_tokens (`int`): What packing computes.
        counted_ratio (`float`): TRL's counted operations by ours: the speed-up at equal efficiency.
        operations (`float`): Ours.
        trl_seconds, seconds (`list[float]`): Time of a pass.
        matmul_rate (`float`): Median operations a second of a large matrix product, measured in between.
        difference (`float`): Largest difference of a row's sum, in nats.
        trl_memory, memory (`int`): Peak bytes of a pass, above what was in use before.
    """

    shape: str
    rows: int
    trl_tokens: int
    tokens: int
    unique_tokens: int
    scored_tokens: int
    counted_ratio: float
    operations: float
    trl_seconds: list[float]
    seconds: list[float]
    matmul_rate: float
    difference: float
    trl_memory: int
    memory: int

    @property
    def ratio(self) -> float:
        """How many times faster than TRL's way: ratio of the medians."""
        return statistics.median(self.trl_seconds) / statistics.median(self.seconds)

    @property
    def efficiency(self) -> float:
        """Useful operations a second, as a share of the machine's matmul rate."""
        return self.operations / statistics.median(self.seconds) / self.matmul_rate


def measure(
    model: Any, workload: Workload, repeats: int, token_budget: int | None, report: Callable[[str], None]
) -> Result:
    """Time a workload `repeats` times each way, alternating, after one small batch of each to warm up."""
    scorer = Scorer(model, mode="packed", token_budget=token_budget)
    list(scorer.score_rows(workload.rows[:2]))  # also the verification
    cost = count_operations(causal_lm(model))
    device = causal_lm(model).get_input_embeddings().weight.device
    trl_seconds, seconds, rates = [], [], []
    trl_memory = memory = 0
    for repeat in range(repeats):
        expected, elapsed, peak = _timed(lambda: score_like_trl(model, workload, device), device)
        trl_seconds.append(elapsed)
        trl_memory = max(trl_memory, peak)
        scorer.stats.clear()
        found, elapsed, peak = _timed(lambda: _sums(scorer, workload.rows), device)
        seconds.append(elapsed)
        memory = max(memory, peak)
        rates.append(matmul_rate(device, next(causal_lm(model).parameters()).dtype))
        report(
            f"{workload.shape}, run {repeat + 1} of {repeats}: TRL {trl_seconds[-1]:.1f} s, "
            f"packed {seconds[-1]:.1f} s, {trl_seconds[-1] / seconds[-1]:.2f}x, matmul {rates[-1] / 1e9:.0f} GFLOP/s"
        )
    columns = [max(len(workload.rows[index]) for index in batch) for batch in workload.batches]
    theirs = sum(len(b) * (cost.span(0, c) + c * cost.head) for b, c in zip(workload.batches, columns, strict=True))
    return Result(
        shape=workload.shape,
        rows=len(workload.rows),
        trl_tokens=sum(len(batch) * c for batch, c in zip(workload.batches, columns, strict=True)),
        tokens=sum(map(len, workload.rows)),
        unique_tokens=scorer.stats.unique_tokens,
        scored_tokens=scorer.stats.scored_tokens,
        counted_ratio=theirs / scorer.stats.operations,
        operations=scorer.stats.operations,
        trl_seconds=trl_seconds,
        seconds=seconds,
        matmul_rate=statistics.median(rates),
        difference=(found - expected).abs().max().item(),
        trl_memory=trl_memory,
        memory=memory,
    )


def score_like_trl(model: Any, workload: Workload, device: torch.device) -> Tensor:
    """TRL's precompute: batches in the order of the data set, padded on the right. Sums, one a row."""
    sums = torch.zeros(len(workload.rows))
    for indices in workload.batches:
        batch = pad_rows([workload.rows[index] for index in indices], device)
        sums[indices] = exact_log_probs(model, batch).sum(1).cpu()
    return sums


def _sums(scorer: Scorer, rows: Sequence[Row]) -> Tensor:
    sums = torch.zeros(len(rows))
    for index, log_probs in scorer.score_rows(rows):
        sums[index] = log_probs.sum()
    return sums


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a square matrix product, the median over half a second."""
    size = 2048 if device.type == "cpu" else 8192
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    rates: list[float] = []
    stop = time.perf_counter() + 0.5
    while time.perf_counter() < stop or len(rates) < 3:
        _, elapsed, _ = _timed(lambda: left @ right, device)
        rates.append(2 * size**3 / elapsed)
    return statistics.median(rates)


def _timed(work: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float, int]:
    """The result, the seconds and the peak bytes of some work."""
    before = _reset_peak(device)
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start, _peak(device) - before


def _reset_peak(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: sets the peak to what is in use
    return _peak(device)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def as_markdown(results: Sequence[Result], model_name: str, dtype: torch.dtype) -> str:
    """A table of results, headed by what they were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    runs = len(results[0].seconds) if results else 0
    lines = [
        f"{model_name}, {str(dtype)[6:]}, {device}, torch {torch.__version__}, {platform.machine()}. "
        f"Medians of {runs} alternating runs; in brackets the ratio of counted operations.",
        "",
        "| rows | TRL's tokens | unique | scored | TRL, s | packed, s | rows/s | times TRL's speed | of matmul rate "
        "| largest difference of a sum | peak memory, TRL and packed |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        seconds = statistics.median(result.seconds)
        lines.append(
            f"| {result.shape}, {result.rows} | {result.trl_tokens:,} | {result.unique_tokens:,} "
            f"| {result.scored_tokens:,} | {statistics.median(result.trl_seconds):.1f} | {seconds:.1f} "
            f"| {result.rows / seconds:.1f} | {result.ratio:.2f}x ({result.counted_ratio:.2f}x) "
            f"| {result.efficiency:.0%} of {result.matmul_rate / 1e9:.0f} GFLOP/s | {result.difference:.1e} nats "
            f"| {result.trl_memory / 2**20:,.0f} and {result.memory / 2**20:,.0f} MiB |"
        )
    return "\n".join(lines) + "\n"


def plot(results: Sequence[Result], path: Path) -> None:
    """Rows a second, every run a dot, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6 + 1.8 * len(results), 3.6), layout="constrained")
    axes = figure.subplots()
    for place, result in enumerate(results):
        ways = (("TRL", result.trl_seconds, "0.6"), ("packed", result.seconds, "tab:blue"))
        for offset, (label, seconds, colour) in zip((-0.2, 0.2), ways, strict=True):
            rates = [result.rows / value for value in seconds]
            axes.bar(
                place + offset, statistics.median(rates), 0.36, color=colour, label=None if place else label, zorder=1
            )
            axes.scatter([place + offset] * len(rates), rates, 8, color="black", zorder=2)
        axes.annotate(
            f"{result.ratio:.1f}x",
            (place + 0.2, result.rows / statistics.median(result.seconds)),
            ha="center",
            va="bottom",
        )
    axes.set_xticks(range(len(results)), [result.shape for result in results])
    axes.set_ylabel("rows per second")
    axes.margins(y=0.12)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
