"""
`trl-refplug bench`: how fast scoring is on your own model and data.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trl_refplug.cli.common import Dtype, torch_dtype
from trl_refplug.errors import ConfigurationError, require_extra


if TYPE_CHECKING:
    from trl_refplug.bench.workloads import Pair


SHAPES = ("pairs", "long-prompt", "grpo", "unshared")  # by default

app = typer.Typer(help="Time the reference pass on your own model and data.", no_args_is_help=True)


@app.callback()
def _bench() -> None:
    """Time the reference pass on your own model and data."""


@app.command()
def score(
    model: Annotated[str, typer.Option(help="Directory or hub id of a causal language model.")],
    data: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="JSON lines in TRL's preference format (prompt, chosen, rejected). Default: random tokens.",
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Pairs to use.")] = 32,
    sample: Annotated[bool, typer.Option(help="Draw the pairs from all of the file, with a fixed seed.")] = False,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="pairs, long-prompt, grpo, unshared, long; repeat for several. Default: all but long."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs each way, alternating.")] = 5,
    max_length: Annotated[int, typer.Option(min=2, help="Rows are cut to this many tokens.")] = 1024,
    token_budget: Annotated[int | None, typer.Option(min=1, help="Most tokens of a packed forward pass.")] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="What the model is loaded in: float32, bfloat16, float16.")
    ] = "float32",
    output: Annotated[Path, typer.Option(help="Folder for score.md, score.png and score.json.")] = Path("."),
) -> None:
    """
    Score rows TRL's way (data set order, padded batches of 8 pairs, its own fused call) and packed, in turns.

    Prints a table, which is in score.md after every run, and draws a plot in score.png at the end. Runs that have
    finished are kept in score.json: interrupted or repeated, the command goes on from them.
    """
    try:
        _score(model, data, rows, sample, shape or SHAPES, repeats, max_length, token_budget, dtype, output)
    except KeyboardInterrupt:
        _say(f"\nInterrupted. The runs that have finished are kept in {output}: the same command goes on from there.")
        raise typer.Exit(130) from None


def _score(
    model: str,
    data: Path | None,
    rows: int,
    sample: bool,
    shapes: Sequence[str],
    repeats: int,
    max_length: int,
    token_budget: int | None,
    dtype: Dtype,
    output: Path,
) -> None:
    require_extra("The plot of the benchmark", "demo", "matplotlib")
    started = time.monotonic()
    chosen = torch_dtype(dtype)

    import torch
    from tqdm import tqdm  # type: ignore[import-untyped]
    from transformers import AutoModelForCausalLM

    from trl_refplug.bench import report, runs, workloads
    from trl_refplug.bench.measure import Result, measure
    from trl_refplug.identity import digest_model

    try:
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        raise ConfigurationError(f"--output {output} cannot be written to: {error}") from None
    finished = runs.FinishedRuns(output / "score.json")
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=chosen).eval()
    digest = digest_model(loaded)
    if torch.cuda.is_available():
        loaded = loaded.to("cuda")
    pairs = _pairs(model, loaded, data, rows, sample)

    works = [workloads.workload(name, pairs, max_length) for name in shapes]
    every = [finished.series(runs.facts(loaded, digest, work, token_budget)) for work in works]

    def results() -> list[Result]:
        return [Result.of(loaded, work, series.runs) for work, series in zip(works, every, strict=True) if series.runs]

    def tabulate() -> str:
        table = report.as_markdown(results(), Path(model).name, chosen)
        (output / "score.md").write_text(table, encoding="utf-8")
        return table

    measured = scored = 0
    for work, series in zip(works, every, strict=True):
        if series.runs:
            to_go = max(0, repeats - len(series.runs))
            _say(f"{work.shape}: {_runs(len(series.runs))} kept from before, {to_go} to go")
        elif others := finished.others_differ_in(series.facts):
            _say(f"{work.shape}: measured anew; the runs in {finished.path} differ in {', '.join(others)}")
        for run in measure(loaded, work, token_budget, repeats, done=len(series.runs)):
            finished.add(series, run)
            measured += 1
            scored += 2 * len(work.rows)
            _say(f"{work.shape}, run {len(series.runs)} of {repeats}: {run}")
            tabulate()
    typer.echo(tabulate())
    # Only here: Ctrl-C while matplotlib is imported comes out as an ImportError.
    report.plot(results(), output / "score.png")
    _say(
        f"Measured {_runs(measured)} ({scored:,} rows) in {tqdm.format_interval(time.monotonic() - started)}. "
        f"Written to {output}: score.md (this table), score.png, score.json (every run)"
    )


def _pairs(model: str, loaded: Any, data: Path | None, rows: int, sample: bool) -> list[Pair]:
    import random

    from transformers import AutoTokenizer

    from trl_refplug.bench.workloads import synthetic_pairs, tokenize_pairs
    from trl_refplug.preference_files import read_pairs

    if data is None:
        return synthetic_pairs(rows, loaded.config.get_text_config().vocab_size)
    pairs = read_pairs(data, None if sample else rows)
    if sample:
        pairs = random.Random(0).sample(pairs, min(rows, len(pairs)))
    return tokenize_pairs(pairs, AutoTokenizer.from_pretrained(model))


def _runs(count: int) -> str:
    return f"{count} run{'' if count == 1 else 's'}"


def _say(line: str) -> None:
    """To the error stream: the output is the table."""
    typer.echo(line, err=True)
