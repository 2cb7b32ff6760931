"""`trl-refplug store`: shows what a log-prob store holds, checks it, and exports its rows as a table."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trl_refplug.cli.checks import check_output
from trl_refplug.cli.tasks import Export, Verify
from trl_refplug.cli.train import launch_task


if TYPE_CHECKING:
    from trl_refplug.store import Manifest, StoreSummary

app = typer.Typer(name="store", help="Look after log-prob stores.", no_args_is_help=True)

Location = Annotated[str, typer.Argument(help="Directory or fsspec URL of the store.")]
Command = Annotated[
    list[str],
    typer.Argument(
        help="After `--`: a training command, `dpo --model_name_or_path ...`. Its model and its rows are used."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback()
def main() -> None:
    """Look after log-prob stores."""


@app.command()
def info(location: Location, as_json: AsJson = False) -> None:
    """Show what is in a store and where it comes from. This reads only the manifests."""
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
        typer.echo(
            f"  {len(summary.set_aside)} files of damaged shards, which were set aside: {', '.join(summary.set_aside)}"
        )
    if summary.journals:
        typer.echo(
            f"  {len(summary.journals)} journals of writers that are at work or were killed (the next writer "
            f"publishes the rows of those): {', '.join(summary.journals)}"
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
    sample: Annotated[
        int, typer.Option(help="Number of rows that the training command's model scores again.", min=1)
    ] = 64,
    tolerance: Annotated[
        float,
        typer.Option(help="Two scorings of a token conflict if they differ by more than this, in nats."),
    ] = 0.02,
    as_json: AsJson = False,
) -> None:
    """
    Read a whole store, check every checksum, and compare rows that were scored twice.

    The exit code is 1 if anything is wrong. With a training command, its model also scores a sample of the rows again:
    `trl-refplug store verify ref-store -- dpo --model_name_or_path ...`. A store holds no tokens, so the tokens of
    these rows come from the training command. The exit code is 1, too, if the new log-probs differ, and 2 if the store
    cannot be read or nothing can be scored again.
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
    Write a training command's data set, together with the log-probs that a store holds for its rows.

    `trl-refplug store export ref-store table.parquet -- dpo --model_name_or_path ...` writes the tokenized rows with
    `ref_chosen_logps` and `ref_rejected_logps` (KTO: `ref_logps`, `ref_KL_logps`), reduced as the command's
    trainer reduces them. It is an error if a row is not in the store: fill the store with `trl-refplug precompute`
    first.
    """
    from trl_refplug.store import summarize

    task = Export(location, output, split)
    summarize(location)  # this raises if there is no store, before anything is loaded
    check_output("OUTPUT", Path(output))
    launch_task(task, command, usage="trl-refplug store export PATH OUTPUT --")


def _sources(summary: StoreSummary) -> list[str]:
    """One line for each provenance, which says how many rows come from it and when they were written."""
    groups: dict[str, list[Manifest]] = {}
    for manifest in summary.manifests:
        shown = {name: value for name, value in manifest.provenance.items() if name != "probe"}
        groups.setdefault(json.dumps(shown, sort_keys=True), []).append(manifest)
    return [
        f"{sum(manifest.rows for manifest in group):,} rows, {group[0].created} to {group[-1].created}: {provenance}"
        for provenance, group in groups.items()
    ]
