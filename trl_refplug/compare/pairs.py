"""The preference pairs that ship with the package. They prefer concise answers to rambling ones."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any


EVAL_PAIRS = 20  # the last pairs of the file, which are held out


def load_pairs() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """
    Load the training pairs and the held-out pairs, in TRL's conversational preference format.

    Each pair is `{"prompt": [message], "chosen": [message], "rejected": [message]}`, where a message is
    `{"role": ..., "content": ...}`.
    """
    text = (resources.files("trl_refplug.compare") / "preferences.jsonl").read_text(encoding="utf-8")
    pairs = [json.loads(line) for line in text.splitlines()]
    return pairs[:-EVAL_PAIRS], pairs[-EVAL_PAIRS:]
