"""Preference pairs from files, in TRL's preference format."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

from trl_refplug.errors import ConfigurationError


COLUMNS = ("prompt", "chosen", "rejected")


def read_pairs(path: Path, count: int | None) -> list[dict[str, Any]]:
    """
    The first `count` pairs (`None`: all) of a JSON-lines file. Further columns are left out.

    Returns:
        `list[dict]`: At least one: `prompt`, `chosen` and `rejected`, all texts or all lists of messages.

    Raises:
        ConfigurationError: The file cannot be read, is empty, or a line is no such pair.
    """
    pairs = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(islice(lines, count), 1):
                pair = json.loads(line)
                if problem := _problem(pair):
                    raise ConfigurationError(
                        f"{path}, line {number}: found {problem}; expected TRL's preference format, a JSON object "
                        f"with {', '.join(COLUMNS)}, all of them texts or all lists of messages."
                    )
                pairs.append({name: pair[name] for name in COLUMNS})
    except json.JSONDecodeError as error:
        raise ConfigurationError(f"{path}, line {number}: not JSON ({error.msg}); expected JSON lines.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from None
    if not pairs:
        raise ConfigurationError(f"{path} is empty; expected at least one pair in TRL's preference format.")
    return pairs


def _problem(pair: Any) -> str | None:
    """What was found that is no pair."""
    if not isinstance(pair, dict):
        return type(pair).__name__
    if not set(COLUMNS) <= set(pair):
        return ", ".join(pair) or "nothing"
    kinds = [type(pair[name]) for name in COLUMNS]
    if kinds in ([str] * 3, [list] * 3):
        return None
    return ", ".join(f"{name} of type {kind.__name__}" for name, kind in zip(COLUMNS, kinds, strict=True))
