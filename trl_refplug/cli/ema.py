"""`trl-refplug ema`: works with the moving references in checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


app = typer.Typer(help="Work with moving references (ref_provider='ema').", no_args_is_help=True)


@app.callback()
def _ema() -> None:
    pass


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint of a run with ref_provider='ema'.")],
    out: Annotated[Path, typer.Argument(help="New directory to write the model or the adapter to.")],
) -> None:
    """Write the reference of a checkpoint as an ordinary model or adapter."""
    from trl_refplug.providers.ema.export import export_reference

    kind = export_reference(checkpoint, out)
    typer.echo(f"Wrote the reference, a{'n adapter' if kind == 'adapter' else ' model'}, to {out}.")
