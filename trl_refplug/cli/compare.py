"""`trl-refplug compare`: the same training job with several reference providers, side by side."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trl_refplug.cli.checks import check_chat_template, check_writable
from trl_refplug.cli.common import exit_on_interrupt, make_output_directory
from trl_refplug.cli.failures import CANNOT_BE_DONE
from trl_refplug.cli.training_runs import ModelOption, SeedOption, StepsOption, resolve_model, step_progress
from trl_refplug.compare.job import Job, Run, Step
from trl_refplug.compare.provider_choice import DEFAULT_PROVIDERS, ProviderChoice, parse_choices
from trl_refplug.errors import require_extra
from trl_refplug.runtime.names import check_name


if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID


def compare(
    provider: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=JSON]",
            help="A provider, with its options as a JSON object if it needs any. Repeat the option for each provider; "
            "all others are compared with the first. Default: adapter, frozen, cached.",
        ),
    ] = None,
    model: ModelOption = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines in TRL's preference format (prompt, chosen, rejected). Default: the pairs of the demo."
        ),
    ] = None,
    steps: StepsOption = 24,
    max_length: Annotated[int, typer.Option(min=2, help="Rows are cut to this many tokens.")] = 256,
    output_dir: Annotated[Path, typer.Option(help="Directory for the table, the pictures and the figures.")] = Path(
        "refplug-compare"
    ),
    seed: SeedOption = 0,
) -> None:
    """
    Train with LoRA-DPO once for each reference provider, and see what each costs and whether they agree.

    Finished runs are kept in the output directory. If the command is interrupted or repeated, it runs only the others.
    """
    from rich.console import Console

    require_extra("The plot of the comparison", "demo", "matplotlib")
    console = Console(highlight=False)
    choices = parse_choices(provider or list(DEFAULT_PROVIDERS))
    job = Job(model or "", None if data is None else str(data), steps, seed, max_length)
    pairs = job.pairs()  # this raises if there is a mistake in the file
    if model is not None:
        check_name("--model", model)
        if isinstance(pairs[0]["prompt"], list):
            check_chat_template("--model", model)
    check_writable("--output-dir", output_dir)
    with console.status("Loading PyTorch and TRL"):
        from trl_refplug.compare import comparison, pictures

        for choice in choices:
            choice.check_combination()
    job = replace(job, model=resolve_model(console, model))
    make_output_directory("--output-dir", output_dir)

    folders = {choice.label: output_dir / "runs" / choice.folder for choice in choices}
    with exit_on_interrupt(f"Finished runs are kept in {output_dir}: the same command continues from there."):
        runs, failures = _run_all(console, job, choices, folders)
    if runs:
        first = runs[0]
        agreements = [
            comparison.compare_runs(first, folders[first.choice.label], run, folders[run.choice.label])
            for run in runs[1:]
        ]
        (output_dir / "compare.md").write_text(comparison.as_markdown(runs, agreements), encoding="utf-8")
        (output_dir / "results.json").write_text(comparison.as_json(runs, agreements), encoding="utf-8")
        pictures.draw_curves(runs, output_dir / "curves.png")
        pictures.draw_costs(runs, output_dir / "costs.png")
        console.print()
        for note in comparison.notes(runs):
            console.print(note, style="dim")
        console.print(comparison.as_table(runs, agreements))
        console.print(
            f"\nWritten to {output_dir}: compare.md (this table), curves.png, costs.png, results.json (every figure), "
            "runs/",
            soft_wrap=True,
        )
    for label, message in failures.items():
        console.print(f"{label} failed: {message} ({folders[label] / 'log.txt'})", style="red", soft_wrap=True)
    if failures:
        raise typer.Exit(CANNOT_BE_DONE)


def _run_all(
    console: Console, job: Job, choices: list[ProviderChoice], folders: dict[str, Path]
) -> tuple[list[Run], dict[str, str]]:
    """Run the job with each provider. Returns the finished runs and, by label, the errors of those that failed."""
    from trl_refplug.compare.child_process import RunFailedError, finished_run

    facts = job.facts()
    runs: list[Run] = []
    failures: dict[str, str] = {}
    with step_progress(console) as progress:
        tasks = [progress.add_task(choice.label, total=job.steps, start=False, status="") for choice in choices]
        for task, choice in zip(tasks, choices, strict=True):
            folder = folders[choice.label]
            run = finished_run(facts, choice, folder)
            if run is not None:
                progress.update(task, completed=job.steps, status="kept from an earlier run")
                runs.append(run)
                continue
            progress.start_task(task)
            try:
                runs.append(_run(progress, task, job, choice, folder))
            except RunFailedError as error:
                failures[choice.label] = str(error)
                progress.update(task, status="failed")
            progress.stop_task(task)
    return runs, failures


def _run(progress: Progress, task: TaskID, job: Job, choice: ProviderChoice, folder: Path) -> Run:
    from trl_refplug.compare.child_process import run_in_child

    def on_phase(phase: str) -> None:
        progress.update(task, status=phase)

    def on_step(step: Step) -> None:
        progress.update(task, completed=step.step, status=str(step))

    return run_in_child(job, choice, folder, on_phase, on_step)
