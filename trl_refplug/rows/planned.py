"""The rows that a run will ask for, known before it begins."""

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
    Rows that a run will ask for, one after the other and without padding: a prompt that is not scored, then a
    completion that is.

    Args:
        token_ids (`NDArray[np.int64]`): `[tokens]`, of all rows.
        offsets (`NDArray[np.int64]`): `[rows + 1]`; row `i` is `token_ids[offsets[i] : offsets[i + 1]]`.
        first_scored (`NDArray[np.int64]`): `[rows]`, at least 1: where in its row the first scored token is. All that
            follow are scored, too. The length of the row, or more, if none is.
    """

    token_ids: NDArray[np.int64]
    offsets: NDArray[np.int64]
    first_scored: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.first_scored)


@runtime_checkable
class PlansRows(Protocol):
    """
    An optional ability of a [`~trl_refplug.ReferenceContext`]: to name the rows of its `planned` batches without
    collating them, some thirty times as fast.
    """

    def planned_rows(self, split: str) -> Iterable[PlannedRows] | None:
        """
        The rows of `planned(split)`, in blocks and in another order. `None` where they cannot be read from the data
        set as it is tokenized, for example with a collator that is not TRL's own.
        """
