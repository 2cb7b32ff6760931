"""
What a scorer counts while it works.
"""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass
class ScoreStats:
    """
    What a scorer has done so far. The passes that verify packed answers against exact ones are not counted; only their
    time is.

    Args:
        rows (`int`): Number of rows scored.
        padded_tokens (`int`): Number of tokens in these rows as they were passed in: batches with their padding, and
            streams, which have none.
        unique_tokens (`int`): Number of tokens that went through the model. In exact passes this includes padding and
            repeated prefixes.
        scored_tokens (`int`): Number of positions that were projected through the LM head for an answer. In packed
            passes, positions that rows share count once.
        forwards (`int`): Number of forward passes.
        operations (`float`): Number of floating-point operations in packed passes.
        seconds (`float`): Wall-clock time spent scoring.
        fallback (`str` or `None`): If packing was asked for and rows were scored exactly all the same, the reason, for
            the last rows to which that happened.
    """

    rows: int = 0
    padded_tokens: int = 0
    unique_tokens: int = 0
    scored_tokens: int = 0
    forwards: int = 0
    operations: float = 0.0
    seconds: float = 0.0
    fallback: str | None = None

    def clear(self) -> None:
        """Set all counters back to their initial values."""
        for counter in fields(self):
            setattr(self, counter.name, counter.default)
