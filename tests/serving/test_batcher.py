"""Merging, taking turns, limits and cancellation, with a model that waits for the test."""

import threading
import time
import weakref
from concurrent.futures import CancelledError

import numpy as np
import pytest

from trl_refplug.rows import PaddedRows, Row
from trl_refplug.serving.batcher import Batcher, ClosedError, QueueFullError
from trl_refplug.serving.engine import WorkUnit


def unit(token, length=10, temperature=1.0, as_sent=False):
    ids = np.full(length, token)
    return WorkUnit(PaddedRows.flush_left([Row(ids, ids)]), temperature, as_sent)


def request(*units):
    return [(unit, [index]) for index, unit in enumerate(units)]


class Model:
    """The log-probs of a row are its first token. It records each batch, and waits for `go` before it answers."""

    def __init__(self):
        self.batches = []
        self.go = threading.Semaphore(0)
        self.begun = threading.Semaphore(0)
        self.poison = None
        self.works = True

    def score(self, units):
        self.batches.append([int(unit.rows.rows[0].input_ids[0]) for unit in units])
        self.begun.release()
        assert self.go.acquire(timeout=10)
        if self.poison in self.batches[-1]:
            raise RuntimeError("poison")
        for index, unit in reversed(list(enumerate(units))):
            first = unit.rows.rows[0].input_ids[0]
            yield index, [np.full(len(unit.rows.rows[0]) - 1, first, np.float32)]


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def batcher(model):
    made = Batcher(model.score, lambda: model.works, token_budget=80, max_queued_tokens=1000)
    # The first unit keeps the thread busy until the test has submitted the units that it is about
    made.submit(0, request(unit(0)))
    assert model.begun.acquire(timeout=10)
    yield made
    for _ in range(1000):
        model.go.release()
    made.close()


def firsts(answers):
    return {index: int(values[0]) for index, values in answers.items()}


def finish(model, batches=100):
    for _ in range(batches):
        model.go.release()


def test_requests_are_merged_and_answers_find_their_way(batcher, model):
    futures = [batcher.submit(c, request(unit(10 * c + 1), unit(10 * c + 2))) for c in (1, 2, 3)]
    finish(model)
    assert [firsts(future.result(10)) for future in futures] == [{0: 10 * c + 1, 1: 10 * c + 2} for c in (1, 2, 3)]
    assert len(model.batches) == 2  # the three requests have 60 tokens, and the budget is 80


def test_clients_take_turns(batcher, model):
    batcher.submit(1, request(*(unit(100 + n) for n in range(30))))
    small = batcher.submit(2, request(unit(200)))
    finish(model, 2)
    assert firsts(small.result(10)) == {0: 200}
    assert model.batches[1] == [100, 101, 200, 102, 103, 104, 105, 106]


def test_turns_go_on_from_batch_to_batch(batcher, model):
    """Each row fills a batch."""
    futures = [batcher.submit(c, request(*(unit(10 * c + n, length=80) for n in range(2)))) for c in (1, 2, 3)]
    finish(model)
    for future in futures:
        future.result(10)
    assert model.batches[1:] == [[10], [20], [30], [11], [21], [31]]


def test_identical_rows_in_flight_are_computed_once(batcher, model):
    first = batcher.submit(1, request(unit(5), unit(6)))
    second = batcher.submit(2, request(unit(6), unit(7), unit(6)))
    finish(model)
    assert firsts(first.result(10)) == {0: 5, 1: 6}
    assert firsts(second.result(10)) == {0: 6, 1: 7, 2: 6}
    assert sorted(model.batches[1]) == [5, 6, 7]


def test_another_temperature_or_scored_position_is_another_row(batcher, model):
    ids = np.full(10, 5)
    half = WorkUnit(PaddedRows.flush_left([Row(ids, np.where(np.arange(10) < 5, -100, 5))]), 1.0)
    rows = (unit(5), unit(5, temperature=0.7), half)
    futures = [batcher.submit(client, request(row)) for client, row in enumerate(rows)]
    finish(model)
    for future in futures:
        future.result(10)
    assert sorted(model.batches[1:]) == [[5], [5, 5]]  # temperatures are not mixed


def test_whole_requests_are_not_merged(batcher, model):
    futures = [batcher.submit(c, request(unit(c, as_sent=True))) for c in (1, 2, 3)]
    finish(model)
    for future in futures:
        future.result(10)
    assert model.batches[1:] == [[1], [2], [3]]


def test_a_unit_beyond_the_budget_is_computed_alone(batcher, model):
    big, small = batcher.submit(1, request(unit(1, length=500))), batcher.submit(1, request(unit(2)))
    finish(model)
    assert firsts(big.result(10)) == {0: 1}
    assert firsts(small.result(10)) == {0: 2}
    assert model.batches[1:] == [[1], [2]]


@pytest.mark.parametrize("budget", [1, 3])
def test_the_smallest_budgets(budget):
    model = Model()
    finish(model)
    batcher = Batcher(model.score, lambda: True, token_budget=budget, max_queued_tokens=1000)
    assert firsts(batcher.submit(0, request(unit(1), unit(2))).result(timeout=10)) == {0: 1, 1: 2}
    batcher.close()


def test_what_nobody_waits_for_is_not_begun(batcher, model):
    leaving = batcher.submit(1, request(unit(1), unit(2)))
    staying = batcher.submit(2, request(unit(2), unit(3)))
    assert leaving.cancel()
    finish(model)
    assert firsts(staying.result(10)) == {0: 2, 1: 3}
    assert sorted(model.batches[1]) == [2, 3]
    with pytest.raises(CancelledError):
        leaving.result()


def test_leaving_while_being_computed_harms_nobody(batcher, model):
    leaving, staying = batcher.submit(1, request(unit(1))), batcher.submit(2, request(unit(1), unit(2)))
    model.go.release()
    assert model.begun.acquire(timeout=10)
    assert leaving.cancel()
    finish(model)
    assert firsts(staying.result(10)) == {0: 1, 1: 2}


def test_the_queue_is_bounded_and_says_when_to_come_back(batcher, model):
    taken = batcher.submit(1, request(*(unit(n, length=100) for n in range(1, 11))))
    with pytest.raises(QueueFullError) as full:
        batcher.submit(2, request(unit(50, length=100)))
    assert 1 <= full.value.retry_after <= 30
    assert taken.cancel()
    batcher.submit(2, request(unit(50, length=100)))
    finish(model)


def test_a_request_beyond_the_bound_is_taken_by_an_empty_queue(model):
    small = Batcher(model.score, lambda: model.works, token_budget=80, max_queued_tokens=10)
    taken = small.submit(1, request(unit(1, length=50)))
    with pytest.raises(QueueFullError):
        small.submit(2, request(unit(2)))
    finish(model)
    assert firsts(taken.result(10)) == {0: 1}
    small.close()


def test_a_slow_model_has_a_short_queue(model):
    """The queue has at most a minute's work, whatever the limit, because clients would give up and ask again."""
    slow = Batcher(model.score, lambda: model.works, token_budget=80, max_queued_tokens=1_000_000)
    first = slow.submit(1, request(unit(1)))
    time.sleep(0.2)
    finish(model, 1)
    first.result(10)  # 10 tokens in 0.2 s: 3000 in a minute
    while not slow._speed:  # it is measured a moment after the answer
        time.sleep(0.001)
    taken = slow.submit(1, request(*(unit(n, length=100) for n in range(2, 42))))
    with pytest.raises(QueueFullError) as full:
        slow.submit(2, request(unit(1)))
    assert full.value.retry_after == 30
    finish(model)
    taken.result(10)
    slow.close()


def test_a_row_that_fails_does_not_fail_the_others(batcher, model):
    model.poison = 2
    futures = [batcher.submit(c, request(unit(c))) for c in (1, 2, 3)]
    finish(model)
    assert firsts(futures[0].result(10)) == {0: 1}
    assert firsts(futures[2].result(10)) == {0: 3}
    with pytest.raises(RuntimeError, match="poison"):
        futures[1].result(10)
    model.poison = None
    assert firsts(batcher.submit(1, request(unit(2))).result(10)) == {0: 2}


def test_a_pass_that_fails_is_out_of_memory_before_its_rows_are_tried_one_by_one():
    """A pass that ran out of memory must not keep what it had."""

    class Activations:
        pass

    alive = []

    def score(units):
        activations = Activations()
        if len(units) > 1:
            alive.append(weakref.ref(activations))
            raise RuntimeError("out of memory")
        kept.extend(reference() for reference in alive)
        yield 0, [np.zeros(9, np.float32)]

    kept = []
    batcher = Batcher(score, lambda: True, token_budget=80, max_queued_tokens=1000)
    assert firsts(batcher.submit(1, request(unit(1), unit(2))).result(10)) == {0: 0, 1: 0}
    assert kept == [None, None]
    batcher.close()


def test_closing_finishes_what_was_taken(batcher, model):
    taken = batcher.submit(1, request(unit(1)))
    closing = threading.Thread(target=batcher.close)
    closing.start()
    finish(model)
    assert firsts(taken.result(10)) == {0: 1}
    closing.join(10)
    assert not batcher.alive
    with pytest.raises(ClosedError):
        batcher.submit(1, request(unit(2)))


def test_a_device_that_computes_no_more_ends_the_work(batcher, model):
    """Everything in the queue fails at once, so that clients can ask elsewhere, instead of failing row by row."""
    model.poison, model.works = 1, False
    poisoned = batcher.submit(1, request(unit(1, as_sent=True)))
    waiting = batcher.submit(2, request(unit(2), unit(3)))
    finish(model)
    with pytest.raises(RuntimeError, match="poison"):
        poisoned.result(10)
    with pytest.raises(ClosedError):
        waiting.result(10)
    batcher.close()
    assert not batcher.alive
    with pytest.raises(ClosedError):
        batcher.submit(3, request(unit(4)))
