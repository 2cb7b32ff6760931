"""The key that a server expects and its clients present. It lives in an environment variable."""

from __future__ import annotations

import os

from trl_refplug.errors import ConfigurationError


def read_key(variable: str, option: str) -> str:
    """
    Args:
        variable (`str`): The environment variable.
        option (`str`): The option that names it, for errors.

    Raises:
        ConfigurationError: It has no key that fits into a header of HTTP. The error does not show it.
    """
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigurationError(
            f"{option} names the environment variable {variable!r}, which is not set in this process, or empty."
        )
    if not (key.isascii() and key.isprintable() and " " not in key):
        # HTTP libraries would refuse it, and some show it when they do
        raise ConfigurationError(
            f"{option} names the environment variable {variable!r}, which has no key in it: expected printable ASCII "
            "without spaces or line breaks."
        )
    return key
