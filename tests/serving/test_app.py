"""The server on a socket, with everything that clients may send."""

import contextlib
import http.client
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import msgspec
import numpy as np
import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trl_refplug.rows import PaddedRows, Row
from trl_refplug.scoring import Scorer
from trl_refplug.serving import RefPlugClient, ServerLimits, wire

from .. import tiny
from .servers import LifespanOf, engine, serving, transport


@pytest.fixture(scope="module")
def served():
    return engine()


@pytest.fixture(scope="module")
def url(served):
    with serving(served) as address:
        yield address


def connection(url, timeout=20):
    return http.client.HTTPConnection(urlsplit(url).netloc, timeout=timeout)


def ask(url, method="POST", path="/v1/score", body=None, headers=None, chunked=False):
    made = connection(url)
    made.request(method, path, body, headers or {}, encode_chunked=chunked)
    response = made.getresponse()
    answer = response.status, dict(response.getheaders()), response.read()
    made.close()
    return answer


def rows(count=3, seed=0, length=12):
    generator = np.random.default_rng(seed)
    return [
        Row.completion(ids[: len(ids) // 2], ids[len(ids) // 2 :])
        for ids in (generator.integers(6, 250, length + n % 5) for n in range(count))
    ]


def body_of(served, wanted, **options):
    return wire.encode_request(
        wire.ScoringRequest(PaddedRows.flush_left(wanted), served.served_model.digest, **options)
    )


def expected(wanted, model=None, **options):
    """The log-probs of rows by another scorer, exact and each row alone."""
    scorer = Scorer(model or tiny.model().eval(), **options)
    padded = [PaddedRows.flush_left([row]) for row in wanted]
    return [next(one.values_by_row(scorer.log_probs(one.to_batch()))) for one in padded]


def assert_near(found, wanted):
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


class TestScoring:
    def test_answers_are_the_models(self, served, url):
        wanted = rows(20)
        body = body_of(served, wanted)
        status, _, answer = ask(url, body=body)
        assert status == 200
        request = wire.ScoringRequest(PaddedRows.flush_left(wanted), served.served_model.digest)
        decoded = wire.decode_answer(answer, request, body)
        assert served.served_model.digest.startswith(decoded.identity)
        assert_near(decoded.values, expected(wanted))

    def test_temperatures_do_not_mix(self, url):
        wanted = rows(4)
        with transport(url) as to, ThreadPoolExecutor(8) as pool:
            client = RefPlugClient(to)
            temperatures = [1.0, 0.7, 1.3, 0.7] * 8
            answers = pool.map(lambda t: client.score(PaddedRows.flush_left(wanted), t), temperatures)
            right = {t: expected(wanted, temperature=t) for t in set(temperatures)}
            for temperature, values in zip(temperatures, answers, strict=True):
                assert_near(values, right[temperature])

    def test_64_clients_each_get_their_own_answers(self, url):
        """Each client sends many requests, with rows of its own and rows that others send, all at once."""
        shared = rows(8, seed=99)
        right_shared = expected(shared)
        work = {client: rows(5, seed=client) for client in range(64)}
        right = {client: expected(mine) for client, mine in work.items()}
        failures = []

        def act(number):
            generator = np.random.default_rng(number)
            with transport(url, deadline=60, read_timeout=60) as to:
                client = RefPlugClient(to)
                for _ in range(5):
                    order = generator.permutation(13)
                    mixed = [(shared + work[number])[i] for i in order]
                    values = client.score(PaddedRows.flush_left(mixed), 1.0)
                    try:
                        assert_near(values, [(right_shared + right[number])[i] for i in order])
                    except AssertionError as error:
                        failures.append((number, error))

        with ThreadPoolExecutor(64) as pool:
            list(pool.map(act, work))
        assert not failures

    def test_bad_rows_are_refused_by_index_and_their_neighbors_scored(self, served, url):
        wanted = rows(5)
        wanted[1] = Row([5, 400_000, 6], [-100, 400_000, 6])
        wanted[3] = Row([], [])
        wanted[4] = Row(np.full(300, 7), np.full(300, 7))
        body = body_of(served, wanted)
        status, _, answer = ask(url, body=body)
        assert status == 200
        request = wire.ScoringRequest(PaddedRows.flush_left(wanted), served.served_model.digest)
        decoded = wire.decode_answer(answer, request, body)
        assert decoded.refused.keys() == {1, 3, 4}
        assert "400000 is not in" in decoded.refused[1]
        assert "empty" in decoded.refused[3]
        assert "300 tokens; the model takes at most 256" in decoded.refused[4]
        assert_near([decoded.values[0], decoded.values[2]], expected([wanted[0], wanted[2]]))

    def test_rows_without_scored_tokens(self, served, url):
        wanted = [Row([5, 6, 7], [-100] * 3), *rows(1), Row([5], [5])]
        with transport(url) as to:
            values = RefPlugClient(to).score(PaddedRows.flush_left(wanted), 1.0)
        assert [len(v) for v in values] == [0, len(wanted[1].scored), 0]

    def test_a_model_without_a_finite_answer_refuses_the_row(self):
        model = tiny.model()
        with torch.no_grad():
            model.lm_head.weight[77] = float("nan")
        broken = engine()
        broken._model.load_state_dict(model.state_dict())
        wanted = rows(2)
        with serving(broken) as url:
            body = body_of(broken, wanted)
            status, _, answer = ask(url, body=body)
        request = wire.ScoringRequest(PaddedRows.flush_left(wanted), broken.served_model.digest)
        assert status == 200
        assert "not finite" in wire.decode_answer(answer, request, body).refused[0]

    def test_a_model_that_fails_is_a_500_and_the_next_request_works(self, monkeypatch):
        failing = engine()
        score, fail = failing.score, threading.Event()

        def maybe(units):
            if fail.is_set():
                raise RuntimeError("secret detail")
            yield from score(units)

        failing.score = maybe
        with serving(failing) as url:
            fail.set()
            status, _, answer = ask(url, body=body_of(failing, rows()))
            assert (status, json.loads(answer)) == (500, {"error": "the model failed: RuntimeError"})
            fail.clear()
            assert ask(url, body=body_of(failing, rows()))[0] == 200

    def test_a_device_that_computes_no_more_ends_the_server(self):
        lost = engine()

        def score(units):
            raise RuntimeError("CUDA error: device-side assert triggered")

        lost.score, lost.device_works = score, lambda: False
        with serving(lost) as url:
            assert ask(url, path="/health", method="GET")[0] == 200
            assert ask(url, body=body_of(lost, rows()))[0] == 500
            wait_until(lambda: gone(url))

    def test_padding_beyond_the_positions_of_a_model_is_refused(self):
        """Such rows must not be computed, because a GPU would not recover from that."""
        served = engine("gpt2", scoring="exact")
        limit = served.served_model.max_length
        short = Row.completion([5, 6], [7, 8])
        wide = PaddedRows([short, short], [0, limit], limit + 8)
        request = wire.ScoringRequest(wide, served.served_model.digest)
        with serving(served) as url:
            body = wire.encode_request(request)
            status, _, answer = ask(url, body=body)
            assert status == 200
            refused = wire.decode_answer(answer, request, body).refused
            assert refused.keys() == {0, 1}
            assert f"padded to {limit + 8}" in refused[0]


def gone(url):
    try:
        return ask(url, path="/health", method="GET")[0] == 503
    except OSError:
        return True


class TestRefusals:
    def test_a_list_of_nothing_does_not_fill_the_memory(self, url):
        """Sixteen million empty lists take a gigabyte of memory."""
        payload = (
            b"\x9a\x00\xc4\x00\xca\0\0\0\0\x10\x00\x90\x90\xdd" + (1 << 23).to_bytes(4, "big") + b"\x90" * (1 << 23)
        )
        body = xxhash.xxh3_64_intdigest(payload).to_bytes(8, "little") + payload
        status, _, answer = ask(url, body=body)
        assert status == 400
        assert "length <= 65536" in json.loads(answer)["error"]

    @pytest.mark.parametrize("body", [b"", b"abc", b"\0" * 100, b"\x93\x01\x02\x03" * 10])
    def test_malformed(self, url, body):
        status, _, answer = ask(url, body=body)
        assert status == 400
        assert "checksum" in json.loads(answer)["error"]

    def test_another_reference_is_asked_for(self, served, url):
        request = wire.ScoringRequest(PaddedRows.flush_left(rows()), "ab" * 16)
        status, _, answer = ask(url, body=wire.encode_request(request))
        assert status == 409
        assert served.served_model.digest in json.loads(answer)["error"]

    def test_unknown_routes_and_methods(self, url):
        assert ask(url, "GET", "/")[0] == 404
        assert ask(url, "GET", "/v1/score")[0] == 405
        assert ask(url, "POST", "/v1/identity")[0] == 405

    def test_health_and_identity(self, served, url):
        assert ask(url, "GET", "/health")[0] == 200
        status, _, answer = ask(url, "GET", "/v1/identity")
        assert status == 200
        assert json.loads(answer)["digest"] == served.served_model.digest

    def test_many_rows_or_tokens(self, served):
        with serving(served, limits=ServerLimits(max_rows=2, max_tokens=40)) as url:
            assert ask(url, body=body_of(served, rows(3)))[0] == 413
            assert ask(url, body=body_of(served, rows(2, length=30)))[0] == 413
            assert ask(url, body=body_of(served, rows(2)))[0] == 200

    @pytest.mark.parametrize("chunked", [False, True], ids=["announced", "chunked"])
    def test_large_bodies_are_not_read_to_the_end(self, served, chunked):
        with serving(served, limits=ServerLimits(max_body_bytes=10_000)) as url, connection_to(url) as raw:
            length = b"transfer-encoding: chunked" if chunked else b"content-length: 100000000000"
            raw.sendall(b"POST /v1/score HTTP/1.1\r\nhost: x\r\n" + length + b"\r\n\r\n")
            piece = (b"800\r\n" + b"x" * 0x800 + b"\r\n") if chunked else b"x" * 0x800
            sent = 0
            try:
                for _ in range(10_000):
                    sent += raw.send(piece)
                    raw.settimeout(0.0001 if sent < 30_000 else 5)
            except (OSError, TimeoutError):
                pass
            assert sent < 10_000_000
            assert ask(url, body=body_of(served, rows()))[0] == 200

    def test_large_body_is_a_413(self, served):
        with serving(served, limits=ServerLimits(max_body_bytes=1000)) as url:
            assert ask(url, body=b"x" * 2000)[0] == 413
            assert ask(url, body=iter([b"x" * 600, b"x" * 600]), chunked=True)[0] == 413

    def test_a_slow_body_is_given_up(self, served):
        with serving(served, limits=ServerLimits(body_timeout=0.5)) as url, connection_to(url) as raw:
            raw.sendall(b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n")
            assert drip(raw) == b"HTTP/1.1 408"

    def test_a_slow_head_is_given_up(self, served):
        with serving(served, limits=ServerLimits(head_timeout=0.5)) as url, connection_to(url) as raw:
            raw.sendall(b"POST /v1/score HTTP/1.1\r\nx-slow: ")
            assert drip(raw) == b""

    def test_silence_and_a_slow_second_head_are_given_up(self, served):
        with serving(served, limits=ServerLimits(head_timeout=0.5)) as url:
            with connection_to(url) as silent:
                assert silent.recv(100) == b""
            with connection_to(url) as raw:
                raw.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
                answer = b""
                while not answer.endswith(b"}"):
                    part = raw.recv(1000)
                    assert part
                    answer += part
                assert answer.startswith(b"HTTP/1.1 200")
                raw.sendall(b"GET /health HTT")
                assert drip(raw) == b""

    def test_who_does_not_take_an_answer_is_given_up(self):
        """Such a client would take memory without end, and the server would wait for it at shutdown."""
        size, given_up = 64 << 20, threading.Event()

        async def large(scope, receive, send):
            headers = [(b"content-length", str(size).encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"x" * size, "more_body": True})
            while (await receive())["type"] != "http.disconnect":
                pass
            given_up.set()

        around = lambda ours: LifespanOf(ours, large)  # noqa: E731
        with serving(engine(), limits=ServerLimits(body_timeout=0.5), around=around) as url, connection_to(url) as raw:
            raw.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            assert given_up.wait(30)
            received = 0
            with contextlib.suppress(ConnectionResetError):
                while part := raw.recv(1 << 20):
                    received += len(part)
        assert 0 < received < size

    def test_a_slow_answer_is_not_given_up(self):
        """The deadlines limit the time that clients take, not the time that scoring takes."""
        slow = delayed(engine(), 1.0)
        with serving(slow, limits=ServerLimits(head_timeout=0.3, body_timeout=0.3)) as url:
            assert ask(url, body=body_of(slow, rows()))[0] == 200

    def test_full_queue(self):
        slow = delayed(engine(), 0.5)
        with serving(slow, limits=ServerLimits(max_queued_tokens=50)) as url, ThreadPoolExecutor(8) as pool:
            bodies = [body_of(slow, rows(3, seed=n)) for n in range(8)]
            answers = list(pool.map(lambda body: ask(url, body=body), bodies))
            statuses = [status for status, _, _ in answers]
            assert set(statuses) == {200, 429}
            for status, headers, _ in answers:
                assert (status == 429) == ("retry-after" in headers)
            with transport(url, deadline=60) as to:  # the client tries again when it is told to
                assert len(RefPlugClient(to).score(PaddedRows.flush_left(rows()), 1.0)) == 3


def waiting(served, go):
    """An engine that waits for `go` before it scores."""
    score = served.score

    def when_told(units):
        assert go.wait(60)
        yield from score(units)

    served.score = when_told
    return served


def delayed(served, seconds):
    score = served.score

    def slowly(units):
        time.sleep(seconds)
        yield from score(units)

    served.score = slowly
    return served


def connection_to(url):
    return socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=10)


def drip(raw):
    """Send one byte after the other, slowly, and return the beginning of the answer."""
    started = time.monotonic()
    raw.settimeout(0.05)
    while time.monotonic() - started < 30:
        try:
            return raw.recv(12)
        except TimeoutError:
            with contextlib.suppress(OSError):  # the connection may be closed; the answer can still be read
                raw.send(b"x")
        except OSError:
            return b""
    raise AssertionError("the server waits for ever")


class TestKey:
    @pytest.fixture(scope="class")
    def locked(self, served):
        with serving(served, key="right-key") as address:
            yield address

    @pytest.mark.parametrize(
        "given", [None, "Bearer wrong", "Bearer right-key ", "bearer right-key", "right-key", "Bearer", "Bearer é"]
    )
    @pytest.mark.parametrize("path", ["/v1/score", "/v1/identity", "/", "/v1/nothing"])
    def test_without_the_key_nothing_is_told(self, locked, given, path):
        if given == "Bearer right-key ":  # HTTP removes white space around a value
            given = "Bearer right-key x"
        headers = {} if given is None else {"authorization": given.encode("latin-1")}
        status, headers, answer = ask(locked, "POST", path, body=b"x", headers=headers)
        assert (status, answer) == (401, b"")

    def test_with_the_key(self, locked, served):
        headers = {"authorization": "Bearer right-key"}
        assert ask(locked, body=body_of(served, rows()), headers=headers)[0] == 200
        assert ask(locked, "GET", "/health")[0] == 200

    def test_two_keys_are_none(self, locked):
        with connection_to(locked) as raw:
            raw.sendall(
                b"GET /v1/identity HTTP/1.1\r\nhost: x\r\nauthorization: Bearer right-key\r\n"
                b"authorization: Bearer wrong\r\n\r\n"
            )
            assert raw.recv(12) == b"HTTP/1.1 401"


class TestLeaving:
    def test_rows_of_a_client_that_left_are_not_begun(self):
        slow = engine()
        score, seen, go = slow.score, [], threading.Event()

        def gated(units):
            seen.append({int(unit.rows.rows[0].input_ids[0]) for unit in units})
            assert go.wait(20)
            yield from score(units)

        slow.score = gated
        with serving(slow) as url:
            occupying = connection(url)
            occupying.request("POST", "/v1/score", body_of(slow, [Row([50, 6], [50, 6])]))
            wait_until(lambda: seen == [{50}])
            leaving, staying = connection(url), connection(url)
            leaving.request("POST", "/v1/score", body_of(slow, [Row([60, 6], [60, 6])]))
            staying.request("POST", "/v1/score", body_of(slow, [Row([70, 6], [70, 6])]))
            time.sleep(0.5)  # both are queued
            leaving.close()
            time.sleep(0.5)  # and now one is not
            go.set()
            assert occupying.getresponse().status == staying.getresponse().status == 200
        assert seen == [{50}, {70}]

    def test_shutting_down_finishes_what_was_taken(self):
        slow, begun = engine(), threading.Event()
        score = slow.score

        def slowly(units):
            begun.set()
            time.sleep(0.5)
            yield from score(units)

        slow.score = slowly
        with serving(slow) as url:
            made = connection(url)
            made.request("POST", "/v1/score", body_of(slow, rows()))
            assert begun.wait(30)
        assert made.getresponse().status == 200  # read after the server has ended


def wait_until(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it does not come true")


# Random requests that HTTP allows, and some that it does not allow


def hostile_bodies(served):
    sound = body_of(served, rows(2))
    payloads = st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=12) | st.dictionaries(st.integers(-9, 9) | st.text(), inner, max_size=4)
        ),
    )
    fields = [
        st.integers(-5, 2**64 - 1),
        st.just(bytes.fromhex(served.served_model.digest)[:8]),
        st.floats(),
        st.integers(-2, 300),
        st.integers(-2, 2**33),
        st.lists(st.integers(-2, 300), max_size=3),
        st.lists(st.integers(-2, 300), max_size=3),
        st.lists(st.lists(st.integers(-2, 300), max_size=6), max_size=3),
        st.sampled_from([0, 1, 2, 4, 8]),
        st.lists(st.binary(max_size=40), max_size=4),
    ]

    def sealed(content):
        payload = msgspec.msgpack.encode(content)
        return xxhash.xxh3_64_intdigest(payload).to_bytes(8, "little") + payload

    @st.composite
    def plausible(draw):
        """Requests with consistent lengths and any ids. Many of them are scored, and some rows are refused."""
        lengths = draw(st.lists(st.integers(0, 20), min_size=1, max_size=4))
        size = draw(st.sampled_from([2, 4]))
        ids = draw(st.lists(st.integers(0, 500), min_size=sum(lengths), max_size=sum(lengths)))
        table = np.array(ids, f"<u{size}").view(np.uint8).reshape(-1, size)
        spans = [[1, n] if n > 1 and draw(st.booleans()) else [] for n in lengths]
        temperature = draw(st.sampled_from([1.0, 0.7, 1e-30, 1e30]))
        width = draw(st.integers(20, 30))
        return sealed(
            [
                draw(st.integers(0, 3)),
                bytes.fromhex(served.served_model.digest)[:8],
                temperature,
                width,
                draw(st.integers(0, 2**32 - 1)),
                lengths,
                draw(st.lists(st.integers(0, 10), min_size=len(lengths), max_size=len(lengths))),
                spans,
                size,
                [column.tobytes() for column in table.T],
            ]
        )

    return st.one_of(
        st.binary(max_size=300),
        st.integers(0, len(sound)).map(lambda n: sound[:n]),
        payloads.map(sealed),
        st.tuples(*fields).map(list).map(sealed),
        plausible(),
    )


def fuzz(served, url, examples):
    counts = {}

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(
        body=hostile_bodies(served),
        method=st.sampled_from(["POST"] * 8 + ["GET", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "BREW"]),
        path=st.sampled_from(
            ["/v1/score"] * 8 + ["/v1/identity", "/health", "/v1/score/", "/%00", "/../x", "//", "*"]
        ),
        headers=st.dictionaries(
            st.sampled_from(["content-type", "accept", "expect", "range", "x-any", "content-encoding", "upgrade"]),
            st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=20),
            max_size=2,
        ),
        chunked=st.booleans(),
    )
    def send(body, method, path, headers, chunked):
        made = connection(url)
        made.putrequest(method, path, skip_accept_encoding=True)
        for name, value in headers.items():
            made.putheader(name, value)
        made.putheader(*(("transfer-encoding", "chunked") if chunked else ("content-length", str(len(body)))))
        made.endheaders(iter([body]) if chunked and body else None if chunked else body, encode_chunked=chunked)
        if chunked and not body:
            made.send(b"0\r\n\r\n")
        response = made.getresponse()
        response.read()
        made.close()
        counts[response.status] = counts.get(response.status, 0) + 1
        assert response.status < 500, (response.status, method, path)

    send()
    assert ask(url, body=body_of(served, rows()))[0] == 200
    assert counts[200] > examples / 50, counts  # some of the requests reach the model
    assert counts[400] > examples / 50, counts
    return counts


def test_no_request_is_a_server_error(served, url):
    fuzz(served, url, 150)


@given(st.binary(max_size=200) | st.text(max_size=60).map(lambda text: f"POST {text} HTTP/1.1\r\n\r\n".encode()))
@settings(max_examples=60)
def test_bytes_that_are_no_http_are_no_server_error(url, sent):
    with connection_to(url) as raw:
        raw.sendall(sent)
        raw.shutdown(socket.SHUT_WR)
        assert not raw.recv(12).startswith(b"HTTP/1.1 5")
    assert ask(url, "GET", "/health")[0] == 200


@pytest.mark.slow
def test_no_request_of_ten_thousand_is_a_server_error(served, url):
    print(fuzz(served, url, 10_000))
