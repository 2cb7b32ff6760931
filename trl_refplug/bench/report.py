"""Results of the scoring benchmark as a table, as a plot and as JSON."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from trl_refplug.bench.measure import Result


def as_markdown(results: Sequence[Result], model_name: str, dtype: torch.dtype) -> str:
    """A table of the results, for `score.md`. Its first lines say what they were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    most = max((len(result.runs) for result in results), default=0)
    lines = [
        f"{model_name}, {str(dtype)[6:]}, {device}, torch {torch.__version__}, {platform.machine()}. "
        f"Medians of {most} alternating runs; in brackets the ratio of counted operations.",
        "",
        "| rows | TRL's tokens | unique | scored | TRL, s | packed, s | rows/s | times TRL's speed | of matmul rate "
        "| largest difference of a sum | peak memory, TRL and packed |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        runs = result.runs
        counted = "-" if result.counted_ratio is None else f"{result.counted_ratio:.2f}x"
        efficiency = "-" if result.efficiency is None else f"{result.efficiency:.0%}"
        fewer = f" ({len(runs)} run{'s' if len(runs) > 1 else ''})" if len(runs) < most else ""
        lines.append(
            f"| {result.shape}, {result.rows}{fewer} | {result.trl_tokens:,} | {runs[-1].unique_tokens:,} "
            f"| {runs[-1].scored_tokens:,} | {result.trl_seconds:.1f} | {result.seconds:.1f} "
            f"| {result.rows / result.seconds:.1f} | {result.ratio:.2f}x ({counted}) "
            f"| {efficiency} of {result.matmul_rate / 1e9:.0f} GFLOP/s "
            f"| {max(run.difference for run in runs):.1e} nats "
            f"| {max(run.trl_memory for run in runs) / 2**20:,.0f} and "
            f"{max(run.memory for run in runs) / 2**20:,.0f} MiB |"
        )
    for result in results:
        if result.fallback:
            lines += ["", f"{result.shape}: some rows were scored exactly, not packed, because of {result.fallback}."]
    return "\n".join(lines) + "\n"


def as_json(results: Sequence[Result]) -> str:
    """Every figure of every run, for `score.json`."""
    return json.dumps([asdict(result) for result in results], indent=1) + "\n"


def plot(results: Sequence[Result], path: Path) -> None:
    """Draw the rows per second as a PNG, with a bar for each median and a dot for each run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6 + 1.8 * len(results), 3.6), layout="constrained")
    axes = figure.subplots()
    for position, result in enumerate(results):
        ways = (
            ("TRL", [run.trl_seconds for run in result.runs], "0.6"),
            ("packed", [run.seconds for run in result.runs], "tab:blue"),
        )
        for offset, (label, seconds, color) in zip((-0.2, 0.2), ways, strict=True):
            rates = [result.rows / value for value in seconds]
            axes.bar(
                position + offset,
                statistics.median(rates),
                0.36,
                color=color,
                label=None if position else label,
                zorder=1,
            )
            axes.scatter([position + offset] * len(rates), rates, 8, color="black", zorder=2)
        highest = (position + 0.2, max(result.rows / run.seconds for run in result.runs))
        axes.annotate(f"{result.ratio:.1f}x", highest, (0, 4), textcoords="offset points", ha="center", va="bottom")
    axes.set_xticks(range(len(results)), [result.shape for result in results])
    axes.set_ylabel("rows per second")
    axes.margins(y=0.12)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
