"""`trl-refplug store`: what a log-prob store holds, whether it is intact and right, and its rows as a table."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from trl_refplug.cli.tasks import Export, Verify
from trl_refplug.cli.train import launch_task


if TYPE_CHECKING:
    from trl_refplug.store import Manifest, StoreSummary

app = typer.Typer(name="store", help="Look after log-prob stores.", no_args_is_help=True)

Location = Annotated[str, typer.Argument(help="Directory or fsspec URL of the store.")]
Command = Annotated[
    list[str],
    typer.Argument(
        help="After `--`: a training command, `dpo --model_name_or_path ...`, whose model and rows are meant."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback()
def main() -> None:
    """Look after log-prob stores."""


@app.command()
def info(location: Location, as_json: AsJson = False) -> None:
    """Say what is in a store and where it comes from. Reads the manifests only."""
    from trl_refplug.store import summarize

    summary = summarize(location)
    if as_json:
        typer.echo(json.dumps({**asdict(summary), "rows": summary.rows, "tokens": summary.tokens}, indent=2))
        return
    typer.echo(
        f"{summary.location}: {summary.rows:,} rows, {summary.tokens:,} log-probs in "
        f"{len(summary.manifests):,} shards, {summary.size / 1e6:,.1f} MB"
    )
    for line in _sources(summary):
        typer.echo(f"  {line}")
    for name, reason in summary.damaged.items():
        typer.echo(f"  damaged: {name}: {reason}")
    if summary.set_aside:
        typer.echo(f"  {len(summary.set_aside)} files of damaged shards, set aside: {', '.join(summary.set_aside)}")
    if summary.journals:
        typer.echo(
            f"  {len(summary.journals)} journals of writers at work, or killed (the next one publishes their rows): "
            f"{', '.join(summary.journals)}"
        )
    if summary.leftovers:
        typer.echo(
            f"  {len(summary.leftovers)} files of writers that did not finish (delete them when no writer is at "
            f"work): {', '.join(summary.leftovers)}"
        )


@app.command()
def verify(
    location: Location,
    command: Command = [],  # noqa: B006 (typer copies it)
    sample: Annotated[int, typer.Option(help="How many rows the training command's model scores again.", min=1)] = 64,
    tolerance: Annotated[
        float, typer.Option(help="Largest difference between two scorings of a token, in nats, that is no conflict.")
    ] = 0.02,
    as_json: AsJson = False,
) -> None:
    """
    Read all of a store: check every checksum, compare rows that were scored twice. Exits with 1 on any finding.

    A store has no tokens, so to score rows again takes the training command that asks for them:
    `trl-refplug store verify ref-store -- dpo --model_name_or_path ...`. Exits with 2 if they differ.
    """
    from trl_refplug.store import verify as verify_store

    report = verify_store(location, tolerance)
    if as_json:
        typer.echo(json.dumps({**asdict(report), "ok": report.ok}, indent=2))
    else:
        typer.echo(
            f"{report.shards:,} shards intact, {report.rows:,} different rows, {report.duplicates:,} more than once"
        )
        for name, reason in report.damaged.items():
            typer.echo(f"damaged: {name}: {reason}")
        for conflict in report.conflicts:
            typer.echo(
                f"conflict: row {conflict.key} differs by {conflict.difference:.3g} nats between shards "
                f"{conflict.shards[0]} (used) and {conflict.shards[1]}"
            )
    if not report.ok:
        raise typer.Exit(1)
    if command:
        launch_task(Verify(location, sample), command, usage="trl-refplug store verify PATH --")


@app.command()
def export(
    location: Location,
    output: Annotated[
        str, typer.Argument(help="File ending in .parquet, .jsonl or .csv, or a directory for `load_from_disk`.")
    ],
    command: Command,
    split: Annotated[str, typer.Option(help="`train`, `eval`, or the name of an evaluation set.")] = "train",
) -> None:
    """
    Write a training command's data set with the log-probs that a store has of its rows.

    `trl-refplug store export ref-store table.parquet -- dpo --model_name_or_path ...` writes the tokenised rows with
    `ref_chosen_logps` and `ref_rejected_logps` (KTO: `ref_logps`, `ref_KL_logps`), reduced as the command's trainer
    does. A row that is not in the store is an error: fill it with `trl-refplug precompute` first.
    """
    from trl_refplug.store import summarize

    summarize(location)  # refuses a place without a store before anything is loaded
    launch_task(Export(location, output, split), command, usage="trl-refplug store export PATH OUTPUT --")


def _sources(summary: StoreSummary) -> list[str]:
    """One line for each provenance: how much comes from it, and when."""
    groups: dict[str, list[Manifest]] = {}
    for manifest in summary.manifests:
        shown = {name: value for name, value in manifest.provenance.items() if name != "probe"}
        groups.setdefault(json.dumps(shown, sort_keys=True), []).append(manifest)
    return [
        f"{sum(manifest.rows for manifest in group):,} rows, {group[0].created} to {group[-1].created}: {provenance}"
        for provenance, group in groups.items()
    ]
