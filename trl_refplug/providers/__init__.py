"""The built-in providers, registered through the same hook as everyone else's."""

from __future__ import annotations

from trl_refplug.hookspecs import Register, hookimpl


API_VERSION = 1

EXTRAS = {"remote": "serve"}
"""Built-in providers that need an optional dependency, and the pip extra that brings it."""


@hookimpl
def refplug_register_providers(register: Register) -> None:
    register("frozen", "trl_refplug.providers.frozen:FrozenProvider")
    register("adapter", "trl_refplug.providers.adapter:AdapterProvider")
    register("ema", "trl_refplug.providers.ema:EmaProvider")
