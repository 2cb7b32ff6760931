"""A plugin as a third party would write it: the smallest provider, named lazily."""

from trl_refplug import hookimpl


API_VERSION = 1


@hookimpl
def refplug_register_providers(register):
    register("uniform", "refplug_uniform.provider:UniformProvider")
