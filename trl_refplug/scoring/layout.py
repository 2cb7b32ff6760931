"""
Decide how rows are laid out for the model: which prefixes are computed only once, and which rows share a forward pass.

This is planning on token ids only, and knows no model. Rows are sorted so that rows with a common prefix are
neighbors. The lengths of the common prefixes of neighbors (`shared`) then describe a tree of all rows, in which each
node is a run of tokens. The rows of one forward pass (a "pack") are a run of neighbors, whose part of the tree is laid
out as one token sequence in depth-first order. In that order all descendants of a node follow it without a gap, so
that a query sees a key exactly if `key <= query < end of the key's subtree`.

A row is cut off before its last scored token: neither that token nor any token after it predicts a token that is
scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from trl_refplug.rows import Ints, Row
from trl_refplug.scoring.operations import Operations


# Overheads are given as the number of tokens that take as long to compute.

NODE_TOKENS = 1.0
"""Overhead of one more node in the tree, which is one more attention call per layer, in tokens."""

MERGE_TOKENS = 0.01
"""Overhead, for each token below a node, of merging one more partial result of attention per layer, in tokens."""

FORWARD_TOKENS = 16.0
"""Overhead of one more forward pass, in which all weights are read once more, in tokens."""


@dataclass(frozen=True)
class Node:
    """Tokens `[start, stop)` of a pack. They see each other causally, and all tokens `[stop, end)` see all of them."""

    start: int
    stop: int
    end: int


@dataclass(frozen=True, eq=False)
class Pack:
    """
    The input of one forward pass, and how to find the rows' answers in its output.

    Args:
        tokens (`np.ndarray`): int64 `[tokens]`, the token ids of the nodes of the tree in depth-first order.
        positions (`np.ndarray`): int64 `[tokens]`, the position of each token in its row.
        nodes (`tuple[Node, ...]`): The nodes in order of `start`. Together they cover all tokens.
        sources (`np.ndarray`): int64 `[scored]`, the indices in `tokens` of the tokens that predict the targets.
        targets (`np.ndarray`): int64 `[scored]`, the token ids to score. Each pair of source and target occurs once.
        rows (`tuple[int, ...]`): The indices of the rows that this pass answers.
        answers (`tuple[np.ndarray, ...]`): For each of `rows`, int64 indices into `[scored]` of its scored tokens, in
            the order of the row.
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
        """Number of tokens of the longest row, as far as it is laid out."""
        return int(self.positions.max()) + 1

    def operations(self, cost: Operations) -> float:
        """Operations of this pass, for its tokens, the pairs of tokens that attend, and the scored positions."""
        pairs = float(self.positions.sum()) + len(self.positions)
        return len(self.tokens) * cost.token + pairs * cost.pair + len(self.targets) * cost.head


def plan(rows: Sequence[Row], budget: int | None, cost: Operations) -> list[Pack]:
    """
    Lay rows out so that scoring them takes as few operations as possible.

    Args:
        rows (`Sequence[Row]`): Any rows. Rows without a scored token are left out.
        budget (`int` or `None`): Most tokens in one pack. A row that is longer gets a pack of its own. With `None` all
            rows go into one pack.
        cost ([`Operations`]): What the model costs, to decide where sharing a prefix pays.

    Returns:
        `list[Pack]`: Every row with a scored token is answered by exactly one pack.
    """
    branches = _branches(rows)
    lengths = [len(branch.tokens) for branch in branches]
    shared = _worthwhile(lengths, _common_prefixes([branch.tokens for branch in branches]), cost)
    return [_lay_out(branches[first:last], shared[first:last]) for first, last in _split(lengths, shared, budget)]


@dataclass(frozen=True, eq=False)
class _Branch:
    """A path from the root of the tree to a leaf, and the rows on it: the longest one, and its prefixes and copies."""

    tokens: Ints
    rows: list[tuple[int, Ints, Ints]]  # index, scored positions, targets


def _branches(rows: Sequence[Row]) -> list[_Branch]:
    """The rows with a scored token, as far as they have to be computed. Rows with common prefixes are neighbors."""
    needed = []
    for index, row in enumerate(rows):
        positions = row.scored
        if len(positions):
            needed.append((row.input_ids[: positions[-1]], (index, positions, row.labels[positions])))
    # Sequences are compared by their big-endian bytes, which sort in the same order as the numbers. In descending
    # order a prefix comes right after the rows that begin with it, so it is enough to compare with the branch before
    needed.sort(key=lambda item: item[0].astype(">u8").tobytes(), reverse=True)
    branches: list[_Branch] = []
    for tokens, wanted in needed:
        if branches and np.array_equal(branches[-1].tokens[: len(tokens)], tokens):
            branches[-1].rows.append(wanted)
        else:
            branches.append(_Branch(tokens, [wanted]))
    return branches


def _common_prefixes(sequences: Sequence[Ints]) -> list[int]:
    """For each sequence, the length of its common prefix with the one before it; 0 for the first."""
    shared = [0] * min(len(sequences), 1)
    for before, after in pairwise(sequences):
        length = min(len(before), len(after))
        differ = before[:length] != after[:length]
        shared.append(int(differ.argmax()) if differ.any() else length)
    return shared


def _worthwhile(lengths: Sequence[int], shared: list[int], cost: Operations) -> list[int]:
    """Give up a node of the tree wherever it saves less than it costs: lower `shared` to the length of its parent."""
    shared = list(shared)
    spans = [(0, len(shared), 0)]  # runs of neighbors [first, last) that share at least `depth` tokens
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
    """Cut neighbors into runs of at most `budget` tokens, so that as few tokens as possible are computed twice."""
    if budget is None:
        return [(0, len(lengths))] if lengths else []
    best: list[tuple[float, int]] = [(0.0, 0)]  # for the first n rows: the least cost, and where the last run begins
    for last in range(1, len(lengths) + 1):
        choices = []
        tokens = 0  # of the run [first, last), without what its first row shares with the row before it
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
    path = np.zeros(max(len(branch.tokens) for branch in branches), np.int64)  # by position in a row: index in tokens
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
