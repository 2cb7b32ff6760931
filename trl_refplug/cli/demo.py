"""`trl-refplug demo`: a small DPO run that needs nothing but this package."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from trl_refplug.cli.checks import check_chat_template, check_writable
from trl_refplug.cli.common import exit_on_interrupt, make_output_directory
from trl_refplug.cli.training_runs import ModelOption, SeedOption, StepsOption, resolve_model, step_progress
from trl_refplug.compare.job import Job, Step
from trl_refplug.compare.provider_choice import ProviderChoice
from trl_refplug.errors import require_extra
from trl_refplug.runtime.names import check_name


if TYPE_CHECKING:
    from rich.console import Console

    from trl_refplug.compare.demo import DemoResult


def demo(
    ref_provider: Annotated[
        str,
        typer.Option(help="Where the reference's log-probs come from: a provider that `trl-refplug plugins` lists."),
    ] = "auto",
    ref_provider_kwargs: Annotated[
        str | None, typer.Option(metavar="JSON", help="The provider's options as a JSON object.")
    ] = None,
    model: ModelOption = None,
    steps: StepsOption = 24,
    output_dir: Annotated[
        Path, typer.Option(help="Directory for the picture, the figures and the trained adapter.")
    ] = Path("refplug-demo"),
    seed: SeedOption = 0,
) -> None:
    """Train SmolLM2-135M with LoRA-DPO for a few minutes, on a CPU, and see what the reference costs."""
    from rich.console import Console

    require_extra("The plot of the demo", "demo", "matplotlib")
    console = Console(highlight=False)
    choice = ProviderChoice(ref_provider, ref_provider_kwargs)
    choice.check()
    if model is not None:
        check_name("--model", model)
        check_chat_template("--model", model)
    check_writable("--output-dir", output_dir)
    with console.status("Loading PyTorch and TRL"):
        from trl_refplug.compare.demo import summary
        from trl_refplug.compare.pictures import draw_demo_curves

        choice.check_combination()
    with exit_on_interrupt("Nothing was written."):
        job = Job(resolve_model(console, model), None, steps, seed)
        make_output_directory("--output-dir", output_dir)
        try:
            # The results replace those of an earlier run only when all of them are there.
            with TemporaryDirectory(dir=output_dir, prefix=".unfinished-", ignore_cleanup_errors=True) as scratch:
                result = _train(console, job, choice, Path(scratch))
                Path(scratch, "results.json").write_text(result.to_json(), encoding="utf-8")
                draw_demo_curves(result, Path(scratch, "curves.png"))
                for name in ("adapter", "results.json", "curves.png"):
                    _replace(Path(scratch, name), output_dir / name)
        finally:
            with contextlib.suppress(OSError):  # the directory is not empty, so it is kept
                output_dir.rmdir()

    console.print()
    console.print(summary(result))
    other = "adapter" if result.provider == "frozen" else "frozen"
    console.print(
        f"\nWritten to {output_dir}: curves.png, results.json (every figure), adapter/ (the trained LoRA)\n"
        f"Next: trl-refplug demo --ref-provider {other} --output-dir {output_dir}-{other}, and compare the two tables",
        soft_wrap=True,
    )


def _train(console: Console, job: Job, choice: ProviderChoice, folder: Path) -> DemoResult:
    from trl_refplug.compare.demo import run_demo

    with step_progress(console) as progress:
        task = progress.add_task("", total=job.steps, status="")

        def on_step(step: Step) -> None:
            progress.update(task, completed=step.step, status=str(step))

        return run_demo(job, choice, folder, lambda phase: progress.update(task, description=phase), on_step)


def _replace(source: Path, target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    source.replace(target)
