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
from trl_refplug.scoring.order import ChooseNext, chosen
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

    def score_passes(
        self, rows: Iterable[Row], choose: ChooseNext | None = None
    ) -> Iterator[list[tuple[int, Tensor]]]:
        """
        Args:
            choose ([`ChooseNext`], *optional*): Asked before every request which of those planned is next. The rows of
                those it leaves out are not answered.

        Yields:
            `list[tuple[int, Tensor]]`: Of the rows of one request, the index and the log-probabilities of the scored
            tokens, in order: float32 `[scored]` on the CPU. Every row once, in any order.
        """
        pending: deque[tuple[list[tuple[int, Row]], Future[Sequence[Values]]]] = deque()
        for request in _requests(rows, choose):
            padded = PaddedRows.flush_left([row for _, row in request])
            pending.append((request, in_background(partial(self._client.score, padded, self._temperature))))
            if len(pending) == _IN_FLIGHT:
                yield _answers(*pending.popleft())
        while pending:
            yield _answers(*pending.popleft())


def _answers(request: list[tuple[int, Row]], future: Future[Sequence[Values]]) -> list[tuple[int, Tensor]]:
    return list(zip(_indices(request), map(torch.from_numpy, future.result()), strict=True))


def _requests(rows: Iterable[Row], choose: ChooseNext | None) -> Iterator[list[tuple[int, Row]]]:
    window: list[tuple[int, Row]] = []
    size = 0
    for item in enumerate(rows):
        window.append(item)
        size += len(item[1])
        if size >= _WINDOW:
            yield from chosen(_cut(window), _indices, choose)
            window, size = [], 0
    yield from chosen(_cut(window), _indices, choose)


def _cut(window: list[tuple[int, Row]]) -> list[list[tuple[int, Row]]]:
    requests: list[list[tuple[int, Row]]] = []
    for item in sorted(window, key=lambda item: len(item[1])):
        if not requests or (len(requests[-1]) + 1) * len(item[1]) > _REQUEST_TOKENS:
            requests.append([])
        requests[-1].append(item)
    return requests


def _indices(request: list[tuple[int, Row]]) -> list[int]:
    return [index for index, _ in request]
