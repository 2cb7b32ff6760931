"""The plugin: what it registers. It imports no torch, so that listing plugins stays instant."""

from trl_refplug import hookimpl
from trl_refplug.hookspecs import Register

API_VERSION = 1  # the plugin interface this was written for


@hookimpl
def refplug_register_providers(register: Register) -> None:
    register("example", "refplug_example.provider:ExampleProvider")
