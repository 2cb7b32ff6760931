"""The preference pairs that ship with the package: concise answers preferred to rambling ones."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any


EVAL_PAIRS = 20  # the last ones of the file are held out


def load_pairs() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """
    The training and the held-out pairs, in TRL's conversational preference format.

    Each is `{"prompt": [message], "chosen": [message], "rejected": [message]}`, a message being
    `{"role": ..., "content": ...}`.
    """
    text = (resources.files("trl_refplug.demo") / "preferences.jsonl").read_text(encoding="utf-8")
    pairs = [json.loads(line) for line in text.splitlines()]
    return pairs[:-EVAL_PAIRS], pairs[-EVAL_PAIRS:]
