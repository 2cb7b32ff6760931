"""Which forward pass comes next: one that shares its rows with other processes leaves out what they have scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias, TypeVar


T = TypeVar("T")

ChooseNext: TypeAlias = Callable[[Sequence[Sequence[int]]], int | None]
"""
Given the indices of the rows of every pass that is left, never none, the number of the one to make next; `None` if the
rest need not be made.
"""


def chosen(passes: list[T], rows: Callable[[T], Sequence[int]], choose: ChooseNext | None) -> Iterator[T]:
    """
    The passes one by one, in the order that `choose` wants.

    Args:
        passes (`list[T]`): Emptied from the start. May be changed in between.
        rows (`Callable`): The indices of the rows of a pass.
    """
    while passes:
        number = 0 if choose is None else choose([rows(each) for each in passes])
        if number is None:
            return
        yield passes.pop(number)
