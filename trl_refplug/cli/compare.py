"""`trl-refplug compare`: the same training job under several reference providers, side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trl_refplug.errors import ConfigurationError, require_extra


if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from trl_refplug.compare.contenders import Contender
    from trl_refplug.compare.run import Job, Run
    from trl_refplug.demo.job import Step


def compare(
    provider: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=JSON]",
            help="A provider, with its options as a JSON object if it needs any. Repeat for each; the others are "
            "compared with the first. Default: adapter, frozen, cached.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Directory or hub id of a chat model. Default: SmolLM2-135M-Instruct, fetched if need be."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="JSON lines in TRL's preference format (prompt, chosen, rejected). Default: the demo's."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps, of two preference pairs each.")] = 24,
    max_length: Annotated[int, typer.Option(min=2, help="Rows are cut to this many tokens.")] = 256,
    output_dir: Annotated[Path, typer.Option(help="Where table, pictures and figures go.")] = Path("refplug-compare"),
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
) -> None:
    """
    Train with LoRA-DPO once for each reference provider, and see what each costs and whether they agree.

    Runs that have finished are kept in the output directory: interrupted or repeated, the command goes on from them.
    """
    from rich.console import Console

    console = Console(highlight=False)
    try:
        _compare(console, provider, model, data, steps, max_length, output_dir, seed)
    except KeyboardInterrupt:
        console.print(
            f"\nInterrupted. What has finished is kept in {output_dir}: the same command goes on from there."
        )
        raise typer.Exit(130) from None


def _compare(
    console: Console,
    providers: list[str] | None,
    model: str | None,
    data: Path | None,
    steps: int,
    max_length: int,
    output_dir: Path,
    seed: int,
) -> None:
    require_extra("The plot of the comparison", "demo", "matplotlib")
    with console.status("Loading PyTorch and TRL"):
        from trl_refplug.compare import pictures, report
        from trl_refplug.compare.contenders import DEFAULT, parse_contenders
        from trl_refplug.compare.run import Job
        from trl_refplug.demo.model import find_model

        contenders = parse_contenders(providers or list(DEFAULT))
        if data is not None:
            Job("", str(data), steps, seed, max_length).pairs()  # a mistake in the file ends here
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        output_dir.joinpath("runs").mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"--output-dir {output_dir} cannot be written to: {error}") from None
    with console.status("Looking for the model"):
        model = _checked(model) if model else find_model(console.print)
    job = Job(model, None if data is None else str(data), steps, seed, max_length)

    folders = {contender.label: output_dir / "runs" / contender.folder for contender in contenders}
    runs, failures = _run_all(console, job, contenders, folders)
    if runs:
        first = runs[0]
        agreements = [
            report.agreement(first, folders[first.contender.label], run, folders[run.contender.label])
            for run in runs[1:]
        ]
        (output_dir / "compare.md").write_text(report.as_markdown(runs, agreements), encoding="utf-8")
        (output_dir / "results.json").write_text(report.as_json(runs, agreements), encoding="utf-8")
        pictures.draw_curves(runs, output_dir / "curves.png")
        pictures.draw_costs(runs, output_dir / "costs.png")
        console.print()
        for note in report.notes(runs):
            console.print(note, style="dim")
        console.print(report.as_table(runs, agreements))
        console.print(
            f"\nWritten to {output_dir}: compare.md (this table), curves.png, costs.png, results.json (every figure), "
            "runs/",
            soft_wrap=True,
        )
    for label, message in failures.items():
        console.print(f"{label} failed: {message} ({folders[label] / 'log.txt'})", style="red", soft_wrap=True)
    if failures:
        raise typer.Exit(1)


def _run_all(
    console: Console, job: Job, contenders: list[Contender], folders: dict[str, Path]
) -> tuple[list[Run], dict[str, str]]:
    """The finished runs, and why others are none."""
    from trl_refplug.cli.progress import step_progress
    from trl_refplug.compare.apart import RunFailedError, finished_run, run_apart

    facts = job.facts()
    runs: list[Run] = []
    failures: dict[str, str] = {}
    with step_progress(console) as progress:
        tasks = [
            progress.add_task(contender.label, total=job.steps, start=False, shown="") for contender in contenders
        ]
        for task, contender in zip(tasks, contenders, strict=True):
            folder = folders[contender.label]
            run = finished_run(facts, contender, folder)
            if run is not None:
                progress.update(task, completed=job.steps, shown="kept from an earlier run")
                runs.append(run)
                continue
            progress.start_task(task)
            try:
                runs.append(run_apart(job, contender, folder, *_shown(progress, task)))
            except RunFailedError as error:
                failures[contender.label] = str(error)
                progress.update(task, shown="failed")
            progress.stop_task(task)
    return runs, failures


def _shown(progress: Progress, task: TaskID) -> tuple[Callable[[str], None], Callable[[Step], None]]:
    from trl_refplug.cli.progress import told

    def on_phase(phase: str) -> None:
        progress.update(task, shown=phase)

    def on_step(step: Step) -> None:
        progress.update(task, completed=step.step, shown=told(step))

    return on_phase, on_step


def _checked(model: str) -> str:
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"--model {model} cannot be loaded: {error}") from None
    return model
