"""What ranks tell each other where all have to do the same. All ranks have to ask."""

from __future__ import annotations

from accelerate.utils import gather_object


def least(number: int) -> int:
    """The smallest of all ranks' numbers."""
    return int(min(gather_object([number])))


def any_rank(holds: bool) -> bool:
    """Whether something holds on any rank."""
    return any(gather_object([holds]))
