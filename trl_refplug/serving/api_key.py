"""The key that a server expects from its clients. Both read it from an environment variable."""

from __future__ import annotations

import os

from trl_refplug.errors import ConfigurationError


def read_api_key(variable: str, option: str) -> str:
    """
    Read a key from the environment.

    Args:
        variable (`str`): The name of the environment variable.
        option (`str`): The option that names the variable, for error messages.

    Raises:
        ConfigurationError: The variable is not set, or HTTP cannot send its value. The message does not show it.
    """
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigurationError(
            f"{option} names the environment variable {variable!r}, which is not set in this process, or empty."
        )
    if not (key.isascii() and key.isprintable() and " " not in key):
        # HTTP libraries would refuse such a key, and some of them show it in their message.
        raise ConfigurationError(
            f"{option} names the environment variable {variable!r}, which has no key in it: expected printable ASCII "
            "without spaces or line breaks."
        )
    return key
