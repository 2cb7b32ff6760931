"""
Scoring many rows on a server, with several requests in flight so that the server always has work.
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
_WINDOW = (
    16 * _REQUEST_TOKENS
)  # so many tokens are sorted by length, so that the rows of a request need little padding


class RemoteBulkScorer:
    """
    Scores a stream of rows on a server: [`~trl_refplug.provider.BulkScorer`].

    Args:
        client ([`ScoringClient`]): Sends the requests.
        temperature (`float`): Logits are divided by it.
    """

    def __init__(self, client: ScoringClient, temperature: float) -> None:
        self._client = client
        self._temperature = temperature

    def score_passes(self, rows: Iterable[Row]) -> Iterator[list[tuple[int, Tensor]]]:
        """Score any number of rows. Each list that is yielded has the answers to one request."""
        pending: deque[tuple[list[tuple[int, Row]], Future[Sequence[Values]]]] = deque()
        for request in _cut_into_requests(rows):
            padded = PaddedRows.flush_left([row for _, row in request])
            pending.append((request, in_background(partial(self._client.score, padded, self._temperature))))
            if len(pending) == _IN_FLIGHT:
                yield _indexed_answers(*pending.popleft())
        while pending:
            yield _indexed_answers(*pending.popleft())


def _indexed_answers(request: list[tuple[int, Row]], future: Future[Sequence[Values]]) -> list[tuple[int, Tensor]]:
    return [(index, torch.from_numpy(values)) for (index, _), values in zip(request, future.result(), strict=True)]


def _cut_into_requests(rows: Iterable[Row]) -> Iterator[list[tuple[int, Row]]]:
    window: list[tuple[int, Row]] = []
    size = 0
    for item in enumerate(rows):
        window.append(item)
        size += len(item[1])
        if size >= _WINDOW:
            yield from _cut_window(window)
            window, size = [], 0
    yield from _cut_window(window)


def _cut_window(window: list[tuple[int, Row]]) -> list[list[tuple[int, Row]]]:
    requests: list[list[tuple[int, Row]]] = []
    for item in sorted(window, key=lambda item: len(item[1])):
        if not requests or (len(requests[-1]) + 1) * len(item[1]) > _REQUEST_TOKENS:
            requests.append([])
        requests[-1].append(item)
    return requests
