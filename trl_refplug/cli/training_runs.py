"""What `trl-refplug demo` and `trl-refplug compare` share: options, the model, and the progress of training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from trl_refplug.errors import ConfigurationError


if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

ModelOption = Annotated[
    str | None,
    typer.Option(
        help="Directory or hub id of a chat model. Default: SmolLM2-135M-Instruct, which is downloaded if needed."
    ),
]
StepsOption = Annotated[int, typer.Option(min=1, help="Number of optimizer steps, of two preference pairs each.")]
SeedOption = Annotated[int, typer.Option(help="Seed of all random numbers.")]


def resolve_model(console: Console, model: str | None) -> str:
    """
    Check that the model can be loaded. Without one, find the demo's model or download it.

    Raises:
        ConfigurationError: The model cannot be loaded.
        DemoModelError: The demo's model can neither be found nor downloaded.
    """
    from transformers import AutoConfig

    from trl_refplug.compare.demo_model import find_model

    with console.status("Looking for the model"):
        if model is None:
            return find_model(console.print)
        try:
            AutoConfig.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"--model {model} cannot be loaded: {error}") from None
        return model


def step_progress(console: Console) -> Progress:
    """A progress display with a bar of optimizer steps for each task, followed by the task's field `status`."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[status]}"),
        console=console,
        refresh_per_second=4,
    )
