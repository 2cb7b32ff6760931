"""`trl-refplug demo`: a small DPO run that needs nothing but this package."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from trl_refplug.errors import ConfigurationError, require_extra


if TYPE_CHECKING:
    from rich.console import Console

    from trl_refplug.demo.job import JobSettings
    from trl_refplug.demo.run import DemoResult


def demo(
    ref_provider: Annotated[
        str, typer.Option(help="Where the reference's log-probs come from: any provider `trl-refplug plugins` lists.")
    ] = "auto",
    ref_provider_kwargs: Annotated[
        str | None, typer.Option(metavar="JSON", help="The provider's options as a JSON object.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Directory or hub id of a chat model. Default: SmolLM2-135M-Instruct, fetched if need be."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps, of two preference pairs each.")] = 24,
    output_dir: Annotated[Path, typer.Option(help="Where the picture, figures and adapter go.")] = Path(
        "refplug-demo"
    ),
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
) -> None:
    """Train SmolLM2-135M with LoRA-DPO for a few minutes, on a CPU, and see what the reference costs."""
    from rich.console import Console

    console = Console(highlight=False)
    try:
        _demo(console, ref_provider, ref_provider_kwargs, model, steps, output_dir, seed)
    except KeyboardInterrupt:
        console.print("\nInterrupted. Nothing was written.")
        raise typer.Exit(130) from None


def _demo(
    console: Console,
    ref_provider: str,
    ref_provider_kwargs: str | None,
    model: str | None,
    steps: int,
    output_dir: Path,
    seed: int,
) -> None:
    require_extra("The plot of the demo", "demo", "matplotlib")
    with console.status("Loading PyTorch and TRL"):
        from trl_refplug.arguments import ReferenceArguments
        from trl_refplug.demo import report
        from trl_refplug.demo.job import JobSettings
        from trl_refplug.demo.model import find_model
        from trl_refplug.trainers.selection import check_reference

        flags = ReferenceArguments(ref_provider=ref_provider, ref_provider_kwargs=ref_provider_kwargs)
        check_reference(flags, policy_is_peft=True, online=False)
    with console.status("Looking for the model"):
        model = model or find_model(console.print)
    settings = JobSettings(model, ref_provider, ref_provider_kwargs, steps, seed)

    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        scratch = TemporaryDirectory(dir=output_dir, prefix=".unfinished-", ignore_cleanup_errors=True)
    except OSError as error:
        raise ConfigurationError(f"--output-dir {output_dir} cannot be written to: {error}") from None
    try:
        with scratch:
            result = _train(console, settings, Path(scratch.name))
            report.write_json(result, Path(scratch.name, "results.json"))
            report.draw(result, Path(scratch.name, "curves.png"))
            for name in ("adapter", "results.json", "curves.png"):
                _replace(Path(scratch.name, name), output_dir / name)
    finally:
        with contextlib.suppress(OSError):  # it holds something, now or since an earlier run
            output_dir.rmdir()

    console.print()
    console.print(report.summary(result))
    other = "adapter" if result.provider == "frozen" else "frozen"
    console.print(
        f"\nWritten to {output_dir}: curves.png, results.json (every figure), adapter/ (the trained LoRA)\n"
        f"Next: trl-refplug demo --ref-provider {other} --output-dir {output_dir}-{other}, and compare the two tables",
        soft_wrap=True,
    )


def _train(console: Console, settings: JobSettings, scratch: Path) -> DemoResult:
    from trl_refplug.cli.progress import step_progress, told
    from trl_refplug.demo.job import Step
    from trl_refplug.demo.run import run

    with step_progress(console) as progress:
        task = progress.add_task("", total=settings.steps, shown="")

        def on_step(step: Step) -> None:
            progress.update(task, completed=step.step, shown=told(step))

        return run(settings, scratch, lambda phase: progress.update(task, description=phase), on_step)


def _replace(source: Path, target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    source.replace(target)
