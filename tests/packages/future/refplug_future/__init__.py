"""Speaks an interface that does not exist yet; its hook must not be called."""

from trl_refplug import hookimpl


API_VERSION = 999


@hookimpl
def refplug_register_providers(register):
    raise AssertionError("called in spite of API_VERSION")
