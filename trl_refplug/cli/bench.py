"""`trl-refplug bench`: measures how fast scoring is on your own model and data."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trl_refplug.cli.checks import check_writable
from trl_refplug.cli.common import Dtype, exit_on_interrupt, make_output_directory, torch_dtype
from trl_refplug.data_files import read_pairs
from trl_refplug.errors import ConfigurationError, did_you_mean, require_extra
from trl_refplug.runtime.names import check_name


if TYPE_CHECKING:
    from trl_refplug.bench.workloads import Pair


DEFAULT_SHAPES = ("pairs", "long-prompt", "grpo", "unshared")

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
    rows: Annotated[int, typer.Option(min=1, help="Number of pairs to use.")] = 32,
    sample: Annotated[
        bool, typer.Option(help="Draw the pairs from the whole file, with a fixed seed, not from its start.")
    ] = False,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="pairs, long-prompt, grpo, unshared, long. Repeat the option for several. Default: all but long."
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Number of timed runs of each way.")] = 5,
    max_length: Annotated[int, typer.Option(min=2, help="Rows are cut to this many tokens.")] = 1024,
    token_budget: Annotated[
        int | None, typer.Option(min=1, help="Largest number of tokens in a packed forward pass.")
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="Precision in which the model is loaded: float32, bfloat16, float16.")
    ] = "float32",
    output: Annotated[Path, typer.Option(help="Directory for score.md, score.png and score.json.")] = Path("."),
) -> None:
    """
    Time two ways to score the same rows, in turns: TRL's way and packed scoring.

    TRL's way takes the rows in the order of the data set, in padded batches of 8 pairs, with TRL's fused call.

    The command prints a table at its end, and draws a plot in score.png. After every run it writes the table so far to
    score.md and all figures to score.json.
    """
    require_extra("The plot of the benchmark", "demo", "matplotlib")
    started = time.monotonic()
    _check_shapes(shape or [])
    check_writable("--output", output)
    check_name("--model", model)
    file_pairs = None if data is None else read_pairs(data, None if sample else rows)

    import torch
    from tqdm import tqdm  # type: ignore[import-untyped]
    from transformers import AutoModelForCausalLM

    from trl_refplug.bench import report
    from trl_refplug.bench.measure import Result, measure
    from trl_refplug.bench.workloads import workload

    make_output_directory("--output", output)
    with exit_on_interrupt(f"If a run has finished, its figures are in {output}: score.md, score.json.", err=True):
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch_dtype(dtype)).eval()
        if torch.cuda.is_available():
            loaded = loaded.to("cuda")
        pairs = _pairs(model, loaded, file_pairs, rows, sample)
        works = [workload(name, pairs, max_length) for name in shape or DEFAULT_SHAPES]

        results: list[Result] = []
        table = ""
        for work in works:
            result = Result.from_runs(loaded, work, [])
            results.append(result)
            for run in measure(loaded, work, token_budget, repeats):
                result.runs.append(run)
                _say(f"{work.shape}, run {len(result.runs)} of {repeats}: {run}")
                table = report.as_markdown(results, Path(model).name, torch_dtype(dtype))
                (output / "score.json").write_text(report.as_json(results), encoding="utf-8")
                (output / "score.md").write_text(table, encoding="utf-8")
        typer.echo(table)
        # matplotlib is imported only now, because Ctrl-C during its import comes out as an ImportError.
        report.plot(results, output / "score.png")
        scored = sum(2 * result.rows * len(result.runs) for result in results)
        _say(
            f"Scored {scored:,} rows in {tqdm.format_interval(time.monotonic() - started)}. "
            f"Written to {output}: score.md (this table), score.png, score.json (every run)"
        )


def _check_shapes(names: list[str]) -> None:
    """Refuse a shape that does not exist, before the model is loaded."""
    if not names:
        return
    from trl_refplug.bench.workloads import SHAPES

    for name in names:
        if name not in SHAPES:
            known = ", ".join(SHAPES)
            raise ConfigurationError(f"--shape {name}: expected one of {known}.{did_you_mean(name, SHAPES)}")


def _pairs(model: str, loaded: Any, pairs: list[dict[str, Any]] | None, rows: int, sample: bool) -> list[Pair]:
    """The pairs to score: those of the file, or random ones if there is none."""
    from transformers import AutoTokenizer

    from trl_refplug.bench.workloads import synthetic_pairs, tokenize_pairs

    if pairs is None:
        return synthetic_pairs(rows, loaded.config.get_text_config().vocab_size)
    if sample:
        pairs = random.Random(0).sample(pairs, min(rows, len(pairs)))
    return tokenize_pairs(pairs, AutoTokenizer.from_pretrained(model))


def _say(line: str) -> None:
    """Print a message to the error stream, because the output is the table."""
    typer.echo(line, err=True)
