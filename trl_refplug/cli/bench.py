"""
`trl-refplug bench`: how fast scoring is on your own model and data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


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
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, ...")] = "float32",
    output: Annotated[Path, typer.Option(help="Folder for score.md and score.png.")] = Path("."),
) -> None:
    """
    Score rows TRL's way (data set order, padded batches of 8 pairs, its own fused call) and packed, in turns.

    Prints a table and writes it to score.md, with a plot in score.png.
    """
    import random

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_refplug.errors import ConfigurationError
    from trl_refplug.scoring import benchmark, workloads

    torch_dtype = getattr(torch, dtype, None)
    if not isinstance(torch_dtype, torch.dtype):
        raise ConfigurationError(
            f"Found --dtype {dtype}, expected a floating-point torch dtype: float32, bfloat16, ..."
        )
    shapes = shape or ["pairs", "long-prompt", "grpo", "unshared"]
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch_dtype).eval()
    if torch.cuda.is_available():
        loaded = loaded.to("cuda")
    if data is None:
        pairs = workloads.synthetic_pairs(rows, loaded.config.get_text_config().vocab_size)
    else:
        pairs = workloads.read_pairs(data, AutoTokenizer.from_pretrained(model), None if sample else rows)
        if sample:
            pairs = random.Random(0).sample(pairs, min(rows, len(pairs)))
    output.mkdir(parents=True, exist_ok=True)
    table = ""
    results = []
    for work in [workloads.workload(name, pairs, max_length) for name in shapes]:  # a wrong shape ends here
        results.append(benchmark.measure(loaded, work, repeats, token_budget, lambda line: typer.echo(line, err=True)))
        table = benchmark.as_markdown(results, Path(model).name, torch_dtype)
        (output / "score.md").write_text(table, encoding="utf-8")
        benchmark.plot(results, output / "score.png")
    typer.echo(table)
