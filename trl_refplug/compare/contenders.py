"""What is compared: providers with their options, as `NAME` or `NAME={"option": value}`."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from trl_refplug.errors import ConfigurationError


DEFAULT = ("adapter", "frozen", "cached")


@dataclass(frozen=True)
class Contender:
    """
    A provider with its options.

    Args:
        name (`str`): What it is registered as.
        kwargs (`str`, *optional*): Its options as JSON text.
    """

    name: str
    kwargs: str | None = None

    @classmethod
    def parse(cls, text: str) -> Contender:
        """`NAME` or `NAME=JSON`."""
        name, _, kwargs = text.partition("=")
        return cls(name.strip(), kwargs.strip() or None)

    @property
    def options(self) -> dict[str, Any]:
        """Its options; the JSON has been checked by then."""
        return dict(json.loads(self.kwargs)) if self.kwargs else {}

    @property
    def label(self) -> str:
        """For people: the name, and the options in brackets."""
        shown = ", ".join(f"{key}={_plain(value)}" for key, value in self.options.items())
        return f"{self.name} ({shown})" if shown else self.name

    @property
    def folder(self) -> str:
        """For file systems: the name, and a digest of the options."""
        name = re.sub(r"[^\w.-]", "_", self.name)
        canonical = json.dumps(self.options, sort_keys=True)
        return f"{name}-{hashlib.sha256(canonical.encode()).hexdigest()[:8]}" if self.options else name


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def parse_contenders(texts: list[str]) -> list[Contender]:
    """
    All of them, checked as far as that is possible without a model.

    Raises:
        RefPlugError: An unknown provider, options that do not fit it, or the same contender twice.
    """
    from trl_refplug.arguments import ReferenceArguments
    from trl_refplug.trainers.selection import check_reference

    contenders: dict[str, Contender] = {}
    for text in texts:
        contender = Contender.parse(text)
        flags = ReferenceArguments(ref_provider=contender.name, ref_provider_kwargs=contender.kwargs)
        check_reference(flags, policy_is_peft=True, online=False)
        if contender.folder in contenders:
            raise ConfigurationError(f"--provider {text} is given twice. Give each provider once, or other options.")
        contenders[contender.folder] = contender
    return list(contenders.values())
