"""The rows that a run will ask for, where they are known before training begins."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable


if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class PlannedRows:
    """
    Some of the rows that a run will ask for, laid end to end without padding. Each row is a prompt, which is not
    scored, followed by a completion, which is.

    Args:
        token_ids (`NDArray[np.int64]`): `[tokens]`, the token ids of all rows.
        offsets (`NDArray[np.int64]`): `[rows + 1]`; row `i` is `token_ids[offsets[i] : offsets[i + 1]]`.
        first_scored (`NDArray[np.int64]`): `[rows]`, the position in its row of the first scored token, at least 1.
            Every token after it is scored, too. A value that is not less than the row's length means that no token of
            the row is scored.
    """

    token_ids: NDArray[np.int64]
    offsets: NDArray[np.int64]
    first_scored: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.first_scored)


@runtime_checkable
class PlansRows(Protocol):
    """
    An optional ability of a [`~trl_refplug.ReferenceContext`]: it can list the rows of its `planned` batches without
    collating them, which is about thirty times as fast.
    """

    def planned_rows(self, split: str) -> Iterable[PlannedRows] | None:
        """
        The rows of `planned(split)`, in blocks, and not in the order of the batches.

        Returns:
            `Iterable[PlannedRows]` or `None`: `None` where the rows cannot be read from the tokenized data set alone,
            for example because the collator is not TRL's own.
        """
