"""The plugin: what it registers. It imports no torch, so that listing plugins stays instant."""

from trl_refplug import hookimpl
from trl_refplug.hookspecs import Register

from refplug_example.options import CAPABILITIES, ExampleOptions

API_VERSION = 1  # the version of the plugin interface that this plugin was written for


@hookimpl
def refplug_register_providers(register: Register) -> None:
    # With its options and capabilities the provider is listed, and its flags are checked, without importing it.
    target = "refplug_example.provider:ExampleProvider"
    register("example", target, options=ExampleOptions, capabilities=CAPABILITIES)
