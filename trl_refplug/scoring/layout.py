"""
How rows are laid out for the model: which prefixes are computed once, and what goes into one forward pass.

Pure planning on token ids. Rows are sorted, so that those with a common prefix are neighbours; the longest common
prefixes of neighbours (`shared`) then describe a tree of all rows, whose nodes are runs of tokens. A micro-batch (a
"pack") is a run of neighbours, laid out as one token sequence in depth-first order. All descendants of a node follow
it without a gap, so a query sees a key exactly if `key <= query < end of the key's subtree`.

Only what is needed is laid out: the last scored token of a row predicts nothing that is scored, so neither it nor what
follows it is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from trl_refplug.rows import Ints, Row
from trl_refplug.scoring.operations import Operations


NODE_TOKENS = 1.0
"""Overhead of one more node in the tree, in tokens' worth of computation: an attention call per layer."""

MERGE_TOKENS = 0.01
"""Overhead of attending to one more ancestor, per token below it: merging two partial results per layer."""

FORWARD_TOKENS = 16.0
"""Overhead of one more forward pass: all weights are read once more."""


@dataclass(frozen=True)
class Node:
    """Tokens `[start, stop)` of a pack, seen by themselves (causally) and by all of `[stop, end)`."""

    start: int
    stop: int
    end: int


@dataclass(frozen=True, eq=False)
class Pack:
    """
    One forward pass.

    Args:
        tokens (`np.ndarray`): int64 `[tokens]`, the nodes of the tree in depth-first order.
        positions (`np.ndarray`): int64 `[tokens]`, the position of each token in its row.
        nodes (`tuple[Node, ...]`): In order of `start`; together they cover all tokens.
        sources (`np.ndarray`): int64 `[scored]`, the token whose output predicts the target.
        targets (`np.ndarray`): int64 `[scored]`, token ids to score. A (source, target) pair occurs once.
        rows (`tuple[int, ...]`): The rows answered by this pass.
        answers (`tuple[np.ndarray, ...]`): For each of `rows`, where in `[scored]` its scored tokens are, in order.
    """

    tokens: Ints
    positions: Ints
    nodes: tuple[Node, ...]
    sources: Ints
    targets: Ints
    rows: tuple[int, ...]
    answers: tuple[Ints, ...]

    @property
    def longest(self) -> int:
        """Number of tokens of the longest row, as laid out."""
        return int(self.positions.max()) + 1

    def operations(self, cost: Operations) -> float:
        """Counted operations of this pass: unique tokens, the pairs they attend to and scored positions."""
        pairs = float(self.positions.sum()) + len(self.positions)
        return len(self.tokens) * cost.token + pairs * cost.pair + len(self.targets) * cost.head


def plan(rows: Sequence[Row], budget: int | None, cost: Operations) -> list[Pack]:
    """
    Lay rows out for as few operations as possible.

    Args:
        rows (`Sequence[Row]`): Any rows; those without a scored token are left out.
        budget (`int` or `None`): Most tokens of one pack. A row longer than that gets a pack of its own. `None`: all
            in one pack.
        cost ([`Operations`]): Decides where sharing pays.

    Returns:
        `list[Pack]`: Every row with a scored token is answered by exactly one of them.
    """
    branches = _branches(rows)
    lengths = [len(branch.tokens) for branch in branches]
    shared = _worthwhile(lengths, _common_prefixes([branch.tokens for branch in branches]), cost)
    return [_lay_out(branches[first:last], shared[first:last]) for first, last in _split(lengths, shared, budget)]


@dataclass(frozen=True, eq=False)
class _Branch:
    """A path from the root of the tree to a leaf, and the rows on it: the longest, its prefixes and copies."""

    tokens: Ints
    rows: list[tuple[int, Ints, Ints]]  # index, scored positions, targets


def _branches(rows: Sequence[Row]) -> list[_Branch]:
    """The rows with a scored token, sorted by what has to be computed of them."""
    needed = []
    for index, row in enumerate(rows):
        positions = row.scored
        if len(positions):
            needed.append((row.input_ids[: positions[-1]], (index, positions, row.labels[positions])))
    # Big-endian bytes sort like the numbers they stand for; in descending order a prefix comes after what it is one of
    needed.sort(key=lambda item: item[0].astype(">u8").tobytes(), reverse=True)
    branches: list[_Branch] = []
    for tokens, wanted in needed:
        if branches and np.array_equal(branches[-1].tokens[: len(tokens)], tokens):
            branches[-1].rows.append(wanted)
        else:
            branches.append(_Branch(tokens, [wanted]))
    return branches


def _common_prefixes(sequences: Sequence[Ints]) -> list[int]:
    """Length of the longest common prefix of each sequence with the one before it; 0 for the first."""
    shared = [0] * min(len(sequences), 1)
    for before, after in pairwise(sequences):
        length = min(len(before), len(after))
        differ = before[:length] != after[:length]
        shared.append(int(differ.argmax()) if differ.any() else length)
    return shared


def _worthwhile(lengths: Sequence[int], shared: list[int], cost: Operations) -> list[int]:
    """Lower `shared` to the enclosing prefix wherever a node of the tree saves less than it costs."""
    shared = list(shared)
    spans = [(0, len(shared), 0)]  # neighbours that share at least `depth` tokens
    while spans:
        first, last, depth = spans.pop()
        if last - first < 2:
            continue
        node = min(shared[first + 1 : last])
        children = [first, *(i for i in range(first + 1, last) if shared[i] == node), last]
        saved = (len(children) - 2) * cost.span(depth, node)
        below = lengths[first] - node + sum(lengths[i] - shared[i] for i in range(first + 1, last))
        if saved <= (NODE_TOKENS + MERGE_TOKENS * below) * cost.token:
            for child in children[1:-1]:
                shared[child] = depth
            node = depth
        spans += [(start, stop, node) for start, stop in pairwise(children)]
    return shared


def _split(lengths: Sequence[int], shared: Sequence[int], budget: int | None) -> list[tuple[int, int]]:
    """Cut neighbours into runs of at most `budget` tokens so that as few prefixes as possible are computed again."""
    if budget is None:
        return [(0, len(lengths))] if lengths else []
    best: list[tuple[float, int]] = [(0.0, 0)]  # least cost of the first n rows, and where their last run begins
    for last in range(1, len(lengths) + 1):
        choices = []
        tokens = 0  # of the run [first, last), less what its first row shares with the row before
        for first in range(last - 1, -1, -1):
            tokens += lengths[first] - shared[first]
            size = tokens + shared[first]
            if size > budget and first < last - 1:
                if tokens > budget:
                    break
                continue
            choices.append((best[first][0] + size + FORWARD_TOKENS, first))
        best.append(min(choices))
    runs = []
    last = len(lengths)
    while last:
        runs.append((best[last][1], last))
        last = best[last][1]
    return runs[::-1]


def _lay_out(branches: Sequence[_Branch], shared: Sequence[int]) -> Pack:
    path = np.zeros(max(len(branch.tokens) for branch in branches), np.int64)  # by position: where the token is
    tokens, positions, sources, targets, rows = [], [], [], [], []
    nodes: list[Node] = []
    unfinished: list[tuple[int, int, int]] = []  # (start, first position, last position) of the nodes on the path
    size = 0

    def close(depth: int) -> None:
        while unfinished and unfinished[-1][2] > depth:
            start, top, bottom = unfinished.pop()
            kept = max(depth - top, 0)
            nodes.append(Node(start + kept, start + bottom - top, size))
            if kept:
                unfinished.append((start, top, depth))

    for number, branch in enumerate(branches):
        depth, length = shared[number] if number else 0, len(branch.tokens)
        close(depth)
        unfinished.append((size, depth, length))
        path[depth:length] = np.arange(size, size + length - depth)
        tokens.append(branch.tokens[depth:])
        positions.append(np.arange(depth, length))
        size += length - depth
        for index, scored, labels in branch.rows:
            rows.append(index)
            sources.append(path[scored - 1])
            targets.append(labels)
    close(0)
    pairs, answers = np.unique(np.concatenate(sources) << 32 | np.concatenate(targets), return_inverse=True)
    return Pack(
        tokens=np.concatenate(tokens),
        positions=np.concatenate(positions),
        nodes=tuple(sorted(nodes, key=lambda node: node.start)),
        sources=pairs >> 32,
        targets=pairs & 0xFFFFFFFF,
        rows=tuple(rows),
        answers=tuple(np.split(answers, np.cumsum([len(source) for source in sources])[:-1])),
    )
