"""The command `trl-refplug`. Its commands import late, so that help and shell completion answer at once."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

import trl_refplug
from trl_refplug.cli import bench, check, compare, demo, ema, new_plugin, plugins, serve, store, train
from trl_refplug.cli.common import show_own_warnings_in_one_line
from trl_refplug.cli.failures import INTERRUPTED, report


# The panels of `--help`, in the order in which it shows them
_TRAIN = "Train"
_REFERENCES = "Reference stores, models and servers"
_MEASURE = "Measure and compare"
_PLUGINS = "Providers and plugins"

app = typer.Typer(
    name="trl-refplug",
    help="Pluggable reference models for TRL.",
    epilog="Exit status: 0 done, or what was compared agrees; 1 it differs; 2 it cannot be done. A mistake is shown "
    "without a traceback, unless TRL_REFPLUG_TRACEBACK=1 is set.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for _method in (train.dpo, train.kto, train.grpo, train.rloo):
    app.command(_method.__name__, rich_help_panel=_TRAIN, **train.COMMAND_SETTINGS)(_method)
app.command("demo", rich_help_panel=_TRAIN)(demo.demo)
app.command("precompute", rich_help_panel=_REFERENCES, **train.PRECOMPUTE_SETTINGS)(train.precompute)
app.add_typer(store.app, name="store", rich_help_panel=_REFERENCES)
app.add_typer(ema.app, name="ema", rich_help_panel=_REFERENCES)
app.command("serve", rich_help_panel=_REFERENCES)(serve.serve)
app.command("compare", rich_help_panel=_MEASURE)(compare.compare)
app.add_typer(bench.app, name="bench", rich_help_panel=_MEASURE)
app.command("plugins", rich_help_panel=_PLUGINS)(plugins.plugins)
app.command("check", rich_help_panel=_PLUGINS)(check.check)
app.command("new-plugin", rich_help_panel=_PLUGINS)(new_plugin.new_plugin)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"trl-refplug {trl_refplug.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main() -> None:
    """
    Run the command line.

    Exit codes: 0 if it did what was asked and what it compared agrees, 1 if what it compared differs, 2 if it cannot
    be done, 130 after Ctrl-C.
    """
    show_own_warnings_in_one_line()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show an arrow shows a question mark
    try:
        app(prog_name="trl-refplug")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        sys.exit(report(error))


if __name__ == "__main__":
    main()
