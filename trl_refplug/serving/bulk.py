"""
Streams of rows: several requests in flight, so that the server always has work and the network never matters.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial

import torch
from torch import Tensor

from trl_refplug.rows import PaddedRows, Row, Values
from trl_refplug.serving.background import in_background
from trl_refplug.serving.client import ScoringClient


_REQUEST_TOKENS = 4096
_IN_FLIGHT = 8
_WINDOW = 16 * _REQUEST_TOKENS  # tokens read ahead and sorted, so that rows of a request are of one length


class BulkScorer:
    """
    Scores any number of rows with few requests.

    Args:
        client ([`ScoringClient`]): Asks.
        temperature (`float`): Logits are divided by it.
    """

    def __init__(self, client: ScoringClient, temperature: float) -> None:
        self._client = client
        self._temperature = temperature

    def score_passes(self, rows: Iterable[Row]) -> Iterator[list[tuple[int, Tensor]]]:
        """Score any number of rows. Each list has the answers to one request."""
        pending: deque[tuple[list[tuple[int, Row]], Future[Sequence[Values]]]] = deque()
        for request in _requests(rows):
            padded = PaddedRows.flush_left([row for _, row in request])
            pending.append((request, in_background(partial(self._client.score, padded, self._temperature))))
            if len(pending) == _IN_FLIGHT:
                yield _answers(*pending.popleft())
        while pending:
            yield _answers(*pending.popleft())


def _answers(request: list[tuple[int, Row]], future: Future[Sequence[Values]]) -> list[tuple[int, Tensor]]:
    return [(index, torch.from_numpy(values)) for (index, _), values in zip(request, future.result(), strict=True)]


def _requests(rows: Iterable[Row]) -> Iterator[list[tuple[int, Row]]]:
    window: list[tuple[int, Row]] = []
    size = 0
    for item in enumerate(rows):
        window.append(item)
        size += len(item[1])
        if size >= _WINDOW:
            yield from _cut(window)
            window, size = [], 0
    yield from _cut(window)


def _cut(window: list[tuple[int, Row]]) -> list[list[tuple[int, Row]]]:
    requests: list[list[tuple[int, Row]]] = []
    for item in sorted(window, key=lambda item: len(item[1])):
        if not requests or (len(requests[-1]) + 1) * len(item[1]) > _REQUEST_TOKENS:
            requests.append([])
        requests[-1].append(item)
    return requests
