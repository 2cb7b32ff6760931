"""`trl-refplug plugins`: lists the installed plugins and providers, where they come from, and their state."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trl_refplug.options import OptionDescription, describe_options


if TYPE_CHECKING:
    from rich.table import Table

    from trl_refplug.plugins import PluginRecord, RegisteredProvider


STATUS_STYLES = {"ok": "green", "blocked": "yellow", "failed": "red", "incompatible": "red"}


def plugins(
    as_json: Annotated[bool, typer.Option("--json", help="Print everything that is known, as JSON.")] = False,
) -> None:
    """List the installed plugins and the reference providers they bring."""
    with contextlib.redirect_stdout(sys.stderr):  # a plugin may print something when it is imported
        listing = _listing()
    if as_json:
        typer.echo(json.dumps(listing, indent=2, default=str))
    else:
        _print_listing(listing)


def _listing() -> dict[str, list[dict[str, Any]]]:
    from trl_refplug.plugins import plugin_manager

    manager = plugin_manager()
    for problem in manager.setting_problems():
        typer.echo(f"Warning: {problem}", err=True)
    providers = [_described_provider(provider) for provider in manager.providers.values()]
    plugins = [_described_plugin(record) for record in manager.records]
    for plugin in plugins:
        broken = [provider["error"] for provider in providers if provider["error"] and _is_of(provider, plugin)]
        if broken and plugin["status"] == "ok":  # its hooks are called, but what it brings cannot be selected
            plugin |= {"status": "failed", "reason": " ".join(broken)}
    return {"plugins": plugins, "providers": providers}


def _is_of(provider: dict[str, Any], plugin: dict[str, Any]) -> bool:
    return (provider["plugin"], provider["distribution"]) == (plugin["name"], plugin["distribution"])


def _described_plugin(record: PluginRecord) -> dict[str, Any]:
    exception = type(record.exception).__name__ if record.exception else None
    return {field.name: getattr(record, field.name) for field in fields(record)} | {"exception": exception}


def _described_provider(provider: RegisteredProvider) -> dict[str, Any]:
    """Everything that is known of a provider. If it cannot be used, `error` says why."""
    described: dict[str, Any] = {
        "name": provider.name,
        "plugin": provider.plugin.name,
        "distribution": provider.plugin.distribution,
        "target": provider.target if isinstance(provider.target, str) else str(provider.target),
        "capabilities": {},
        "options": [],
        "error": "",
    }
    if problem := provider.problem():
        return described | {"error": problem}
    try:
        described["capabilities"] = asdict(provider.capabilities)
        described["options"] = [asdict(option) for option in describe_options(provider.options)]
    except Exception as error:
        described["error"] = str(error)
    return described


def _print_listing(listing: dict[str, list[dict[str, Any]]]) -> None:
    from rich.console import Console
    from rich.text import Text

    plugins = _table("Plugins", "Plugin", "Status", "Installed as, from")
    for plugin in listing["plugins"]:
        style = STATUS_STYLES[plugin["status"]]
        details = Text(f"{plugin['distribution']} {plugin['version']}\n")
        details.append(_shorten(plugin["location"]), style="dim")
        if plugin["reason"]:
            details.append(f"\n{plugin['reason']}", style=style)
        plugins.add_row(Text(plugin["name"], style="bold"), Text(plugin["status"], style=style), details)

    providers = _table("Providers", "Provider", "Plugin", "Can", "Options (ref_provider_kwargs)")
    for provider in listing["providers"]:
        can = Text("\n".join(name for name, value in provider["capabilities"].items() if value) or "-")
        if provider["error"]:
            options = Text(provider["error"], style="red")
        else:
            options = Text("\n".join(str(OptionDescription(**option)) for option in provider["options"]) or "-")
        providers.add_row(Text(provider["name"], style="bold"), Text(provider["plugin"]), can, options)

    console = Console(highlight=False)
    console.print(plugins, providers)
    for plugin in listing["plugins"]:
        if plugin["traceback"]:  # the plugin's own code failed, and its author needs the traceback
            console.print(Text(f"{plugin['name']}: {plugin['traceback']}"))


def _table(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_lines=False)
    for column in columns[:-1]:
        table.add_column(column, no_wrap=True, overflow="fold")
    table.add_column(columns[-1], overflow="fold")
    return table


def _shorten(path: str) -> str:
    """Shorten a path: leave out `__init__.py`, and write `~` for the home directory."""
    path, home = path.removesuffix("/__init__.py"), str(Path.home())
    return f"~{path[len(home) :]}" if path.startswith(f"{home}/") else path
