"""Servers die and networks damage answers: every value is right, or the run ends with an error that says why."""

import contextlib
import os
import random
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from starlette.requests import Request
from starlette.responses import Response
from transformers import TrainerCallback

from trl_refplug import ReferenceMismatchError, RemoteError
from trl_refplug.rows import PaddedRows, Row
from trl_refplug.serving import RefPlugClient, in_background, wire

from .. import tiny
from ..trainers.runs import assert_same, build, finished, train
from .faults import Failing, cut_short, flipped, proxied, shortened, sometimes
from .servers import SENT, LifespanOf, ServerProcess, engine, free_port, serving, transport, watched
from .test_app import assert_near, delayed, expected, rows, wait_until, waiting


def remote(url, **options):
    return {"ref_provider": "remote", "ref_provider_kwargs": {"url": url, "deadline": 60, **options}}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def path(directory):
    return tiny.saved(directory)


@pytest.fixture(scope="module")
def frozen(directory, path):
    return train("dpo", directory, path, args={"ref_provider": "frozen"})


SECOND_STEP = 3
"""The number of the request for the second step: the first one is for the probe, as training begins."""


class Hurry(TrainerCallback):
    """After the first step, reduce the deadline of requests to three seconds."""

    def __init__(self, to):
        self._transport = to

    def on_step_end(self, *args, **kwargs):
        self._transport._deadline = 3


class TestKilledMidRequest:
    """Server processes that are killed while they have a request of the second training step."""

    def test_and_restarted_training_goes_on(self, tmp_path, path, frozen, caplog):
        arguments = (path, "--scoring", "exact", "--port", str(free_port()))
        with ExitStack() as stack:
            server = stack.enter_context(ServerProcess(*arguments))
            trainer = build("dpo", tmp_path, path, args=remote(server.wait(), deadline=240))
            with server.killed_mid_request(
                SECOND_STEP, lambda: stack.enter_context(ServerProcess(*arguments))
            ) as died:
                trainer.train()
        assert died
        assert "the connection broke" in caplog.text
        assert trainer.ref_model.provider.counters()["retries"] > 0
        assert_same(finished(trainer), frozen)

    def test_and_restarted_with_other_weights_the_run_ends(self, tmp_path, path):
        port = ("--scoring", "exact", "--port", str(free_port()))
        tiny.model(seed=5).save_pretrained(tmp_path / "other")
        other = str(tmp_path / "other")
        with ExitStack() as stack:
            server = stack.enter_context(ServerProcess(path, *port))
            trainer = build("dpo", tmp_path, path, args=remote(server.wait(), deadline=240))
            with (
                server.killed_mid_request(SECOND_STEP, lambda: stack.enter_context(ServerProcess(other, *port))),
                pytest.raises(ReferenceMismatchError, match=r"restarted with other weights.*model of before"),
            ):
                trainer.train()
        assert trainer.state.global_step == 1

    def test_for_good_the_run_ends_within_the_deadline(self, tmp_path, path, caplog):
        with ServerProcess(path, "--scoring", "exact", "--port", "0") as server:
            url = server.wait()
            # Without prefetching, the request for the second step is made after the first step
            trainer = build("dpo", tmp_path, path, args={**remote(url, deadline=240), "ref_prefetch": 0})
            trainer.add_callback(Hurry(trainer.ref_model.provider._client.transport))
            error = (
                rf"within 3 s .option 'deadline'.; tried (?!1 )\d+ times at {url}\. .*, at {url}: it cannot be reached"
            )
            with server.killed_mid_request(SECOND_STEP) as died, pytest.raises(RemoteError, match=error):
                trainer.train()
            assert time.monotonic() - died[0] < 60  # this machine may be busy
        assert "the connection broke" in caplog.text
        assert trainer.state.global_step == 1

    def test_another_one_takes_over(self, tmp_path, path, frozen, caplog):
        arguments = (path, "--scoring", "exact", "--port", "0")
        with ServerProcess(*arguments) as goes, ServerProcess(*arguments) as stays:
            urls = goes.wait(), stays.wait()
            # Without prefetching, there is one request in flight at a time, and the first of equal servers is asked
            trainer = build("dpo", tmp_path, path, args={**remote(list(urls)), "ref_prefetch": 0})
            with goes.killed_mid_request(SECOND_STEP) as died:
                trainer.train()
            assert stays.process.poll() is None
        assert died
        assert f"{urls[0]}: the connection broke" in caplog.text
        assert_same(finished(trainer), frozen)


class TestProcesses:
    @contextlib.contextmanager
    def working(self, path, count):
        """A server, a client, and the future answer to `count` rows that the server is already scoring."""
        wanted = [Row(ids, ids) for ids in np.random.default_rng(0).integers(6, 250, (count, 250))]
        patient = {"deadline": 240, "read_timeout": 240}
        with ServerProcess(path, "--port", "0") as server, transport(server.wait(), **patient) as to:
            client, sent = RefPlugClient(to), threading.Event()
            with watched(lambda event: sent.set() if event == SENT else None):
                answer = in_background(lambda: client.score(PaddedRows.flush_left(wanted), 1.0))
                assert sent.wait(30)
            for _ in range(3):  # when the server has answered later requests, it has seen this one
                to.send("GET", "/health", repr)
            assert not answer.done()
            yield server, to, answer

    def test_sigterm_finishes_what_was_taken(self, path):
        with self.working(path, 400) as (server, to, answer):
            server.process.send_signal(signal.SIGTERM)
            assert len(answer.result(240)) == 400
            assert to.stats.retries == 0
            assert server.process.wait(30) in (0, -signal.SIGTERM)

    def test_the_second_ctrl_c_ends_it_at_once(self, path):
        with self.working(path, 4000) as (server, to, answer):
            server.process.send_signal(signal.SIGINT)
            with contextlib.suppress(ConnectionRefusedError):
                while server.process.poll() is None:  # until it listens no more
                    socket.create_connection(urlsplit(to.urls[0]).netloc.split(":"), timeout=5).close()
                    time.sleep(0.05)
            server.process.send_signal(signal.SIGINT)
            assert server.process.wait(30) == 130
            assert not answer.done()
            assert "terminate called" not in server.process.stderr.read()
            to.close()
            with pytest.raises(RemoteError):
                answer.result(30)


class TestGoneForGood:
    def test_a_server_that_does_not_answer_any_more(self, path):
        with serving(delayed(engine(), 3.0)) as url, transport(url) as to:
            client = RefPlugClient(to)
            to._timeout, to._deadline = httpx.Timeout(0.5), 2
            started = time.monotonic()
            with pytest.raises(RemoteError, match="did not answer in time"):
                client.score(PaddedRows.flush_left(rows()), 1.0)
            assert time.monotonic() - started < 30


class TestReplicas:
    def test_none_is_there_at_the_start_and_then_one_is(self):
        ports = free_port(), free_port()
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        with ThreadPoolExecutor(1) as pool, transport(*urls, connect_timeout=0.3) as to:
            connecting = pool.submit(RefPlugClient, to)
            time.sleep(1)
            assert not connecting.done()
            with serving(engine(), port=ports[1]):
                connecting.result(20).score(PaddedRows.flush_left(rows()), 1.0)

    def test_none_is_ever_there(self):
        urls = [f"http://127.0.0.1:{free_port()}" for _ in range(2)]
        error = (
            rf"within 1 s .option 'deadline'.; tried at {urls[0]}, {urls[1]}\. .* at ({'|'.join(urls)}): it cannot be"
        )
        with transport(*urls, connect_timeout=0.3, deadline=1) as to, pytest.raises(RemoteError, match=error):
            RefPlugClient(to)

    def test_one_that_is_not_there_at_the_start_is_used_later(self, path):
        port = free_port()
        with serving(engine()) as there, transport(there, f"http://127.0.0.1:{port}", connect_timeout=0.5) as to:
            client = RefPlugClient(to)
            with serving(engine(), port=port) as late:
                first, second = to._pool.endpoints
                assert (second.url, second.failures > 0) == (late, True)
                first.not_before = time.monotonic() + 60  # as if it had failed
                client.score(PaddedRows.flush_left(rows()), 1.0)
                assert second.failures == 0

    def test_one_that_stays_away_is_asked_rarely_while_another_answers(self):
        with serving(engine()) as there, transport(f"http://127.0.0.1:{free_port()}", there, deadline=300) as to:
            client = RefPlugClient(to)
            away, _ = to._pool.endpoints
            away.failures, away.not_before = 20, 0.0  # as after some minutes of failures
            client.score(PaddedRows.flush_left(rows()), 1.0)
            assert 10 < away.not_before - time.monotonic() <= 60


def test_retries_leave_the_global_random_stream_alone():
    with serving(engine(), around=lambda app: Failing(app, 0.5)) as url, transport(url) as to:
        client = RefPlugClient(to)
        state = random.getstate()
        for seed in range(6):
            client.score(PaddedRows.flush_left(rows(1, seed=seed)), 1.0)
        assert to.stats.retries > 0
        assert random.getstate() == state


class TestLoad:
    def test_the_least_loaded_is_asked(self):
        go = threading.Event()
        with ExitStack() as stack:
            urls = [stack.enter_context(serving(waiting(engine(), go))) for _ in range(3)]
            to, pool = stack.enter_context(transport(*urls)), stack.enter_context(ThreadPoolExecutor(6))
            stack.callback(go.set)  # also after a failure, because the servers would wait
            client = RefPlugClient(to)
            asked = [rows(1, seed=n) for n in range(6)]
            answers = [pool.submit(client.score, PaddedRows.flush_left(each), 1.0) for each in asked]
            wait_until(lambda: sum(server.in_flight for server in to._pool.endpoints) == 6)
            assert [server.in_flight for server in to._pool.endpoints] == [2, 2, 2]
            go.set()
            for each, answer in zip(asked, answers, strict=True):
                assert_near(answer.result(30), expected(each))


class TestAnswers:
    @pytest.mark.parametrize("damage", [cut_short, flipped, shortened])
    def test_damaged_answers_are_asked_for_again(self, damage):
        wanted = [rows(4, seed=n) for n in range(6)]
        with serving(engine()) as url, proxied(url, sometimes(0.5, damage)) as proxy, transport(proxy) as to:
            client = RefPlugClient(to)
            for asked in wanted:
                assert_near(client.score(PaddedRows.flush_left(asked), 1.0), expected(asked))
            assert to.stats.retries > 0

    @pytest.mark.parametrize("damage", [cut_short, flipped, shortened])
    def test_nothing_but_damaged_answers_is_an_error(self, damage):
        with serving(engine()) as url, proxied(url, damage) as proxy, transport(proxy) as to:
            client = RefPlugClient(to)
            to._deadline = 1
            # A busy machine may not see the end of the last answer before the deadline
            with pytest.raises(RemoteError, match=r"damaged|cut short|too slowly|in time"):
                client.score(PaddedRows.flush_left(rows()), 1.0)

    def test_an_older_answer_is_not_taken_for_the_new_one(self):
        """A proxy answers from its cache."""
        first = []

        def cached(answer):
            first.append(answer)
            return first[0]

        with serving(engine()) as url, proxied(url, cached) as proxy, transport(proxy) as to:
            client = RefPlugClient(to)
            assert_near(client.score(PaddedRows.flush_left(rows()), 1.0), expected(rows()))
            to._deadline = 1
            with pytest.raises(RemoteError, match=r"damaged|too slowly|in time"):  # for the reason given above
                client.score(PaddedRows.flush_left(rows(seed=1)), 1.0)


def test_an_answer_of_another_reference_stops_the_run(path, tmp_path):
    """The answer is complete, undamaged and to the right request, but from other weights."""

    class Impostor:
        def __init__(self, app):
            self.app = app

        async def __call__(self, scope, receive, send):
            if scope.get("path") != "/v1/score" or not provider:
                await self.app(scope, receive, send)
                return
            body = await Request(scope, receive).body()
            asked = wire.decode_request(body, max_rows=100, max_tokens=10_000).rows.rows
            values = [np.zeros(len(row.scored), np.float32) for row in asked]
            answer = wire.encode_answer(wire.ScoringAnswer("ab" * 16, values, {}), body)
            await Response(answer)(scope, receive, send)

    provider = []
    with serving(engine(scoring="exact"), around=Impostor) as url:
        trainer = build("dpo", tmp_path, path, args=remote(url))
        provider.append(trainer.ref_model.provider)
        with pytest.raises(ReferenceMismatchError, match="answered for abababab"):
            trainer.train()


def test_a_third_of_all_requests_fails(tmp_path, path, frozen):
    failing = []

    def around(app):
        failing.append(Failing(app, 0.3))
        return failing[0]

    with serving(engine(scoring="exact"), around=around) as url:
        trainer = build("dpo", tmp_path, path, args={**remote(url), "max_steps": 12})
        trainer.train()
        quiet = train("dpo", tmp_path, path, args={"ref_provider": "frozen", "max_steps": 12})
        assert_same(finished(trainer), quiet)
        with transport(url) as to:
            client = RefPlugClient(to)
            for seed in range(20):
                asked = rows(3, seed=seed)
                for ours, theirs in zip(client.score(PaddedRows.flush_left(asked), 1.0), expected(asked), strict=True):
                    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert failing[0].failed > 5


def test_an_answer_that_trickles_in_ends_at_the_deadline():
    """Each byte arrives within the read timeout."""

    def trickle():
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
            for _ in range(1000):
                connection.sendall(b"x")
                time.sleep(0.1)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=trickle, daemon=True).start()
        started = time.monotonic()
        with (
            transport(f"http://127.0.0.1:{listener.getsockname()[1]}", deadline=1) as to,
            pytest.raises(RemoteError, match="did not answer in time"),
        ):
            to.send("GET", "/v1/identity", repr)
        assert time.monotonic() - started < 30


def test_a_server_is_left_alone_for_as_long_as_it_asks():
    asked = []

    def busy_once(ours):
        async def app(scope, receive, send):
            asked.append(time.monotonic())
            answer = Response(status_code=429, headers={"retry-after": "2"}) if len(asked) == 1 else ours
            await answer(scope, receive, send)

        return LifespanOf(ours, app)

    with serving(engine(), around=busy_once) as url, transport(url) as to:
        to.send("GET", "/health", repr)
    assert len(asked) == 2
    assert asked[1] - asked[0] >= 2


def test_clients_that_were_sent_away_do_not_all_come_back_at_once():
    async def full(scope, receive, send):
        await Response(status_code=429, headers={"retry-after": "10"})(scope, receive, send)

    pauses = []
    with serving(engine(), around=lambda ours: LifespanOf(ours, full)) as url:
        for _ in range(6):
            started = time.monotonic()
            with transport(url, deadline=5) as to, pytest.raises(RemoteError, match="429"):
                to.send("GET", "/health", repr)
            pauses.append(to._pool.endpoints[0].not_before - started)
    assert min(pauses) >= 10
    assert max(pauses) - min(pauses) > 0.2


def test_a_redirect_is_not_followed():
    """Following it would send the key to another server."""
    reached = []

    async def elsewhere(scope, receive, send):
        reached.append(scope["path"])

    async def moved(scope, receive, send):
        await Response(status_code=307, headers={"location": f"{other}/v1/identity"})(scope, receive, send)

    with (
        serving(engine(), around=lambda ours: LifespanOf(ours, elsewhere)) as other,
        serving(engine(), around=lambda ours: LifespanOf(ours, moved)) as url,
        transport(url, key="k1") as to,
        pytest.raises(RemoteError, match=r"redirects to .*not followed.*option 'url'"),
    ):
        RefPlugClient(to)
    assert not reached


def test_a_proxy_that_asks_to_be_left_alone_for_an_hour_does_not_end_the_run():
    async def restarting(scope, receive, send):
        await Response(status_code=503, headers={"retry-after": "3600"})(scope, receive, send)

    around = lambda ours: LifespanOf(ours, restarting)  # noqa: E731
    with serving(engine(), around=around) as url, transport(url, deadline=300) as to:
        threading.Timer(1, to.close).start()
        with pytest.raises(RemoteError, match="closed"):  # it was still waiting
            to.send("GET", "/health", repr)
        assert to._pool.endpoints[0].not_before - time.monotonic() <= 72


def test_closing_between_two_steps_of_an_attempt():
    with transport(f"http://127.0.0.1:{free_port()}") as to:
        opened = to._http_client

        def open_and_close():
            client = opened()
            to.close()
            return client

        to._http_client = open_and_close
        with pytest.raises(RemoteError, match="closed"):
            to.send("GET", "/health", repr)


def test_a_fork_does_not_wait_for_the_locks_of_threads_it_does_not_have():
    with serving(engine()) as url, transport(url) as to:
        client = RefPlugClient(to)
        locks = to._lock, to._pool._lock, to._closing._cond
        for lock in locks:
            lock.acquire()
        child = os.fork()
        if not child:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(30)
            with contextlib.suppress(BaseException):
                assert len(client.score(PaddedRows.flush_left(rows()), 1.0)) == 3
                to.close()
                os._exit(0)
            os._exit(1)
        for lock in locks:
            lock.release()
        assert os.waitpid(child, 0)[1] == 0
        assert len(client.score(PaddedRows.flush_left(rows()), 1.0)) == 3


def test_closing_ends_waiting_at_once():
    with transport(f"http://127.0.0.1:{free_port()}", deadline=60) as to:
        threading.Timer(0.5, to.close).start()
        started = time.monotonic()
        with pytest.raises(RemoteError, match="closed"):
            RefPlugClient(to)
        assert time.monotonic() - started < 30
