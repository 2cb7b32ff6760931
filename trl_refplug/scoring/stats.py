"""
What a scorer counts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass
class ScoreStats:
    """
    What a scorer has done so far. Of the verification that packed answers can be trusted, only the time counts.

    Args:
        rows (`int`): Rows scored.
        padded_tokens (`int`): Tokens of the rows as they came: of batches with their padding, of streams without.
        unique_tokens (`int`): Tokens that went through the model, with padding and repeats where they did.
        scored_tokens (`int`): Positions that were asked for; if packed, identical ones once.
        forwards (`int`): Forward passes.
        operations (`float`): Counted operations of the packed passes.
        seconds (`float`): Wall-clock time.
        fallback (`str` or `None`): Why the last rows that were not packed, though packing was asked for, were not.
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
        """Start counting afresh."""
        for counter in fields(self):
            setattr(self, counter.name, counter.default)
