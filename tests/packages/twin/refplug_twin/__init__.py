"""Claims a provider name that another distribution claims too."""

from trl_refplug import hookimpl


@hookimpl
def refplug_register_providers(register):
    register("uniform", "refplug_twin.provider:TwinProvider")
