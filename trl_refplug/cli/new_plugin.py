"""`trl-refplug new-plugin`: writes a complete plugin package for authors to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trl_refplug.errors import ConfigurationError


_TEMPLATE = Path(__file__).with_name("plugin_template")
_MODULE = "refplug_example"  # the template is a working package; these are its module's and its provider's names
_NAME = "example"


def new_plugin(
    name: Annotated[str, typer.Argument(help="Name of the provider, as in ref_provider=NAME.")],
    directory: Annotated[
        Path | None,
        typer.Option(help="New directory for the package. It must not exist yet. Default: ./refplug-NAME."),
    ] = None,
) -> None:
    """Write a complete, installable plugin package with one provider, its tests and a README."""
    from trl_refplug.plugins import plugin_manager
    from trl_refplug.plugins.checks import registration_problem

    builtin = [known for known, provider in plugin_manager().providers.items() if provider.plugin.name == "builtin"]
    if problem := registration_problem(name, "package:Class", builtin=builtin, own=()):
        raise ConfigurationError(problem)
    target = directory or Path(f"refplug-{name}")
    if target.exists():
        raise ConfigurationError(f"{target} exists already. Choose another name or --directory, or remove it.")
    _write(_TEMPLATE, target, name)
    typer.echo(
        f"{target} is a plugin with the provider {name!r}. Next:\n"
        f"  pip install -e '{target}[test]'\n"
        f"  pytest {target}\n"
        f"  trl-refplug dpo --ref_provider {name} ...\n"
        f"Its provider is in {target / _renamed(_MODULE, name) / 'provider.py'}."
    )


def _write(source: Path, target: Path, name: str) -> None:
    """Copy a directory of the template, with the plugin's names in all files and file names."""
    target.mkdir(parents=True)
    for entry in source.iterdir():
        if entry.name.startswith((".", "__pycache__")):  # these are files of other tools
            continue
        path = target / _renamed(entry.name, name)
        if entry.is_dir():
            _write(entry, path, name)
        else:
            path.write_text(_renamed(entry.read_text(encoding="utf-8"), name), encoding="utf-8")


def _renamed(text: str, name: str) -> str:
    words = [word for word in name.replace("-", "_").split("_") if word]
    text = text.replace(_MODULE, f"refplug_{'_'.join(words)}")
    text = text.replace(_NAME.capitalize(), "".join(word.capitalize() for word in words))
    return text.replace(_NAME, name)
