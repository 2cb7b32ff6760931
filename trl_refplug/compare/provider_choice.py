"""The providers to compare, given as `NAME` or `NAME={"option": value}`."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from trl_refplug.arguments import ReferenceArguments
from trl_refplug.errors import ConfigurationError
from trl_refplug.plugins import check_reference_flags


DEFAULT_PROVIDERS = ("adapter", "frozen", "cached")


@dataclass(frozen=True)
class ProviderChoice:
    """
    A provider with its options.

    Args:
        name (`str`): The name under which the provider is registered.
        kwargs (`str`, *optional*): Its options as JSON text.
    """

    name: str
    kwargs: str | None = None

    @classmethod
    def parse(cls, text: str) -> ProviderChoice:
        """Split `NAME` or `NAME=JSON` into its parts. The JSON is not checked here."""
        name, _, kwargs = text.partition("=")
        return cls(name.strip(), kwargs.strip() or None)

    def check(self) -> None:
        """
        Check that the provider exists and that the options fit it. This imports no torch, unless the provider does.

        Raises:
            RefPlugError: The provider is unknown, or the options do not fit it.
        """
        flags = ReferenceArguments(ref_provider=self.name, ref_provider_kwargs=self.kwargs)
        check_reference_flags(flags, policy_is_peft=True)

    def check_combination(self) -> None:
        """
        Check what the provider itself says about its options. This imports the provider.

        Raises:
            RefPlugError: The options contradict each other.
        """
        from trl_refplug.trainers.selection import check_reference

        flags = ReferenceArguments(ref_provider=self.name, ref_provider_kwargs=self.kwargs)
        check_reference(flags, policy_is_peft=True, online=False)

    @property
    def options(self) -> dict[str, Any]:
        """The options as a dictionary. It takes for granted that the JSON text has been checked."""
        return dict(json.loads(self.kwargs)) if self.kwargs else {}

    @property
    def label(self) -> str:
        """A text for people: the name, and the options in parentheses."""
        shown = ", ".join(f"{key}={_unquoted(value)}" for key, value in self.options.items())
        return f"{self.name} ({shown})" if shown else self.name

    @property
    def folder(self) -> str:
        """A name for a directory: the provider's name, and a digest of the options if there are any."""
        name = re.sub(r"[^\w.-]", "_", self.name)
        canonical = json.dumps(self.options, sort_keys=True)
        return f"{name}-{hashlib.sha256(canonical.encode()).hexdigest()[:8]}" if self.options else name


def _unquoted(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def parse_choices(texts: list[str]) -> list[ProviderChoice]:
    """
    Parse and check what `--provider` was given.

    Raises:
        RefPlugError: A provider is unknown, its options do not fit it, or the same choice is given twice.
    """
    choices: dict[str, ProviderChoice] = {}
    for text in texts:
        choice = ProviderChoice.parse(text)
        choice.check()
        if choice.folder in choices:
            raise ConfigurationError(
                f"--provider {text} is given twice. Give each provider once, or give it different options."
            )
        choices[choice.folder] = choice
    return list(choices.values())
