"""A weighted mixture of references, as a plugin of trl-refplug."""

from trl_refplug import hookimpl
from trl_refplug.hookspecs import Register

API_VERSION = 1


@hookimpl
def refplug_register_providers(register: Register) -> None:
    register("mixture", "refplug_mixture.provider:MixtureProvider")
