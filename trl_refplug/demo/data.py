"""Preference pairs: those that ship with the package (concise answers preferred to rambling ones), or from a file."""

from __future__ import annotations

import json
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

from trl_refplug.errors import ConfigurationError


EVAL_PAIRS = 20  # the last ones of the file are held out
COLUMNS = ("prompt", "chosen", "rejected")


def load_pairs() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """
    The training and the held-out pairs, in TRL's conversational preference format.

    Each is `{"prompt": [message], "chosen": [message], "rejected": [message]}`, a message being
    `{"role": ..., "content": ...}`.
    """
    text = (resources.files("trl_refplug.demo") / "preferences.jsonl").read_text(encoding="utf-8")
    pairs = [json.loads(line) for line in text.splitlines()]
    return pairs[:-EVAL_PAIRS], pairs[-EVAL_PAIRS:]


def read_pairs(path: Path, count: int) -> list[dict[str, Any]]:
    """
    The first `count` pairs of a JSON-lines file in TRL's preference format, conversational or not.

    Raises:
        ConfigurationError: The file cannot be read, is empty, or a line is no such pair.
    """
    pairs = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(islice(lines, count), 1):
                pair = json.loads(line)
                if not isinstance(pair, dict) or not set(COLUMNS) <= set(pair):
                    found = ", ".join(pair) if isinstance(pair, dict) else type(pair).__name__
                    raise ConfigurationError(
                        f"{path}, line {number}: found {found or 'nothing'}; expected TRL's preference format, "
                        f"a JSON object with {', '.join(COLUMNS)}."
                    )
                pairs.append({name: pair[name] for name in COLUMNS})
    except json.JSONDecodeError as error:
        raise ConfigurationError(f"{path}, line {number}: not JSON ({error.msg}); expected JSON lines.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from None
    if not pairs:
        raise ConfigurationError(f"{path} is empty; expected at least one pair in TRL's preference format.")
    return pairs
