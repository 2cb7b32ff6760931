"""Requests and answers are restored bit for bit, and nothing else is accepted as one."""

import msgspec
import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_refplug import ReferenceBatch
from trl_refplug.rows import PaddedRows, Row
from trl_refplug.serving import wire


DIGEST = "0123456789abcdef" * 2
LIMITS = {"max_rows": 64, "max_tokens": 4096}


@st.composite
def batches(draw):
    """Batches with any padding, any scored positions and ids of any size."""
    count, width = draw(st.integers(1, 6)), draw(st.integers(1, 40))
    highest = draw(st.sampled_from([10, 49151, 65535, 65536, 2**31]))
    padding = draw(st.integers(0, highest))
    ids, mask = np.full((count, width), padding), np.zeros((count, width), np.int64)
    labels = np.full((count, width), -100)
    for row in range(count):
        length = draw(st.integers(1, width))
        left = draw(st.integers(0, width - length))
        ids[row, left : left + length] = draw(st.lists(st.integers(0, highest), min_size=length, max_size=length))
        mask[row, left : left + length] = 1
        scored = np.array(draw(st.lists(st.booleans(), min_size=length, max_size=length)))
        scored[0] = False
        labels[row, left : left + length][scored] = ids[row, left : left + length][scored]
    return ReferenceBatch(*(torch.from_numpy(table.astype(np.int64)) for table in (ids, mask, labels)))


@st.composite
def exchanges(draw):
    """A request and its answer, with any finite numbers."""
    rows = PaddedRows.from_batch(draw(batches()))
    request = wire.ScoringRequest(rows, DIGEST, draw(st.floats(0.01, 10)), draw(st.integers(0, 2**32 - 1)))
    refused = draw(st.dictionaries(st.integers(0, len(rows) - 1), st.text(max_size=20), max_size=2))
    number = st.floats(width=32, allow_nan=False, allow_infinity=False)
    values = [
        None
        if index in refused
        else np.array(draw(st.lists(number, min_size=len(row.scored), max_size=len(row.scored))), np.float32)
        for index, row in enumerate(rows.rows)
    ]
    return request, wire.ScoringAnswer(DIGEST, values, refused)


@given(batches())
def test_request_restores_the_very_tensors(batch):
    body = wire.encode_request(wire.ScoringRequest(PaddedRows.from_batch(batch), DIGEST, 0.7, 5))
    request = wire.decode_request(body, **LIMITS)
    assert (request.identity, request.temperature, request.client) == (DIGEST[:16], 0.7, 5)
    again = request.rows.to_batch()
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(getattr(again, name), getattr(batch, name)), name


@given(exchanges())
def test_answer_restores_the_very_bits(exchange):
    request, answer = exchange
    body = wire.encode_request(request)
    again = wire.decode_answer(wire.encode_answer(answer, body), request, body)
    assert again.identity == DIGEST[:16]
    assert again.refused == answer.refused
    for ours, theirs in zip(again.values, answer.values, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or ours.tobytes() == theirs.tobytes()


@given(exchanges(), st.data())
@settings(max_examples=200)
def test_changed_bytes_are_noticed(exchange, data):
    request, answer = exchange
    body = wire.encode_request(request)
    for sent, read in (
        (body, lambda changed: wire.decode_request(changed, **LIMITS)),
        (wire.encode_answer(answer, body), lambda changed: wire.decode_answer(changed, request, body)),
    ):
        position = data.draw(st.integers(0, len(sent) - 1))
        flipped = bytearray(sent)
        flipped[position] ^= 1 << data.draw(st.integers(0, 7))
        for damaged in (bytes(flipped), sent[:position], sent + b"\0"):
            with pytest.raises(wire.WireError, match="checksum"):
                read(damaged)


@given(exchanges(), exchanges())
def test_the_answer_to_another_request_is_none(one, two):
    bodies = [wire.encode_request(request) for request, _ in (one, two)]
    answer = wire.encode_answer(two[1], bodies[1])
    if bodies[0] == bodies[1]:
        return
    with pytest.raises(wire.WireError, match="checksum"):
        wire.decode_answer(answer, one[0], bodies[0])


def sealed(content, seed=0):
    payload = msgspec.msgpack.encode(content)
    return xxhash.xxh3_64_intdigest(payload, seed).to_bytes(8, "little") + payload


# client, identity, temperature, width, padding id, lengths, lefts, spans, id bytes, id planes
SOUND = [1, b"\1" * 8, 1.0, 4, 0, [3], [1], [[1, 3]], 2, [b"\1\2\3", b"\0\0\0"]]


def changed(index, value):
    return [*SOUND[:index], value, *SOUND[index + 1 :]]


def test_what_is_malformed_below_is_sound_otherwise():
    (row,) = wire.decode_request(sealed(SOUND), **LIMITS).rows.rows
    assert row.input_ids.tolist() == [1, 2, 3]
    assert row.labels.tolist() == [-100, 2, 3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(1, b""), "identity"),
        (changed(1, b"\1" * 16), "identity"),
        (changed(2, float("nan")), "temperature"),
        (changed(2, 0.0), "temperature"),
        (changed(3, 3), "length or padding"),
        (changed(3, 1 << 62), "too many tokens"),
        (changed(4, -1), "padding id"),
        (changed(5, [-1]), "length or padding"),
        (changed(5, []), "number of rows"),
        (changed(5, [1 << 62]), "length or padding"),
        (changed(6, [-1]), "length or padding"),
        (changed(7, [[0, 3]]), "spans"),
        (changed(7, [[1, 4]]), "spans"),
        (changed(7, [[2, 1]]), "spans"),
        (changed(7, [[1]]), "spans"),
        (changed(8, 3), "size of token ids"),
        (changed(9, [b"\1\2\3"]), "number of byte planes"),
        (changed(9, [b"\1\2", b"\0\0\0"]), "decompressed"),
        (changed(9, [b"\xa4\xff\xff\xff\xff\x01\x00\x00", b"\0\0\0"]), "length of a byte plane"),
        ([*SOUND, 1], "format"),
        (SOUND[:-1], "format"),
        ({"rows": 1}, "format"),
        (None, "format"),
    ],
)
def test_malformed_requests(content, message):
    with pytest.raises(wire.WireError, match=message):
        wire.decode_request(sealed(content), **LIMITS)


def test_too_many_rows_are_not_looked_at():
    with pytest.raises(wire.TooLargeError, match="65, at most 64"):
        wire.decode_request(sealed([*SOUND[:5], [0] * 65, [0] * 65, [[]] * 65, 2, []]), **LIMITS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_answers_are_finite(value):
    rows = PaddedRows.flush_left([Row([1, 2, 3], [-100, 2, 3])])
    request = wire.ScoringRequest(rows, DIGEST)
    body = wire.encode_request(request)
    answer = wire.ScoringAnswer(DIGEST, [np.array([-1.0, value], np.float32)], {})
    with pytest.raises(wire.WireError, match="not finite"):
        wire.decode_answer(wire.encode_answer(answer, body), request, body)


def test_wrong_lengths_are_no_answer():
    rows = PaddedRows.flush_left([Row([1, 2, 3], [-100, 2, 3])])
    request = wire.ScoringRequest(rows, DIGEST)
    body = wire.encode_request(request)
    for count in (0, 1, 3):
        answer = wire.ScoringAnswer(DIGEST, [np.zeros(count, np.float32)], {})
        with pytest.raises(wire.WireError):
            wire.decode_answer(wire.encode_answer(answer, body), request, body)


@pytest.mark.parametrize("ids", [[-1, 2], [1, 2**32]])
def test_ids_that_no_model_has_are_not_sent(ids):
    with pytest.raises(wire.WireError, match="token ids from"):
        wire.encode_request(wire.ScoringRequest(PaddedRows.flush_left([Row(ids, ids)]), DIGEST))


def test_six_bytes_a_token_at_most():
    """With random ids and log-probs, only the sign and exponent of log-probs can be compressed."""
    generator = np.random.default_rng(0)
    ids = generator.integers(0, 49152, (8, 200))
    request = wire.ScoringRequest(PaddedRows.flush_left([Row(row, row) for row in ids]), DIGEST)
    body = wire.encode_request(request)
    values = list(-generator.gamma(2.0, 3.0, (8, 199)).astype(np.float32))
    answer = wire.encode_answer(wire.ScoringAnswer(DIGEST, values, {}), body)
    assert (len(body) + len(answer)) / ids.size < 5.6  # without the headers of HTTP
