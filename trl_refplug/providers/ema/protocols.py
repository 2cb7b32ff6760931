"""What the `ema` provider asks of a reference that moves, whatever it is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class MovingReference(Protocol):
    """A reference that follows the policy."""

    @property
    def sharded(self) -> bool:
        """Whether every rank holds, and saves, another part of the reference."""

    def distance_to_policy(self) -> float:
        """Return `|policy - reference| / |policy|`. This is a collective operation if the weights are sharded."""

    def counters(self) -> dict[str, float]:
        """Return further numbers for the logs."""

    def training_begins(self) -> None:
        """The policy is now where it will be trained. Called on every rank, after [`load`] if a run is resumed."""

    def training_ends(self) -> None:
        """Training is over. Another one may begin, from its own step 1."""

    def save(self, directory: Path, *, rank: int, writes: bool) -> None:
        """
        Write the reference. If it is not sharded, it is written only where the trainer `writes`. Called on every rank.
        """

    def load(self, directory: Path) -> None:
        """Restore what [`save`] wrote."""


class MovingAverage(MovingReference, Protocol):
    """A reference that is an average of itself and the policy."""

    def move_to_policy(self, alpha: float) -> None:
        """Set `reference = alpha * policy + (1 - alpha) * reference`."""
