"""
What serving costs: throughput with 64 clients against the scoring engine called directly, and bytes on the wire.

    python -m pytest -m benchmark -s tests/benchmarks/test_serving.py

Without REFPLUG_MODEL (a directory), with a random model of 11 million parameters and the vocabulary of SmolLM2.
REFPLUG_ROWS of a request and REFPLUG_REPEATS may be changed. The server is a process of its own; both sides use one
thread (OMP_NUM_THREADS=1).
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from trl_refplug.rows import PaddedRows, Row
from trl_refplug.scoring import Scorer
from trl_refplug.serving import RefPlugClient

from ..serving.servers import ServerProcess, transport


CLIENTS, REQUESTS, TOKENS = 64, 2, 200
ROWS = int(os.environ.get("REFPLUG_ROWS", "4"))  # a request
pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    if given := os.environ.get("REFPLUG_MODEL"):
        return given
    directory = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def work():
    generator = np.random.default_rng(0)
    ids = generator.integers(0, 49152, (CLIENTS, REQUESTS, ROWS, TOKENS))
    return [[[Row(row, row) for row in request] for request in client] for client in ids]


def test_throughput_of_64_clients(path, work):
    rows = [row for client in work for request in client for row in request]
    scorer = Scorer(AutoModelForCausalLM.from_pretrained(path).eval(), mode="packed")
    list(scorer.score_rows(rows[:64]))  # and its verification

    def direct():
        started = time.perf_counter()
        for _ in scorer.score_rows(rows):
            pass
        return time.perf_counter() - started

    with ServerProcess(path, "--port", "0") as server, transport(server.wait(), deadline=600, read_timeout=600) as to:
        clients = [RefPlugClient(to) for _ in range(CLIENTS)]
        clients[0].score(PaddedRows.flush_left(rows[:64]), 1.0)

        def act(number):
            for request in work[number]:
                clients[number].score(PaddedRows.flush_left(request), 1.0)

        def served():
            started = time.perf_counter()
            with ThreadPoolExecutor(CLIENTS) as pool:
                list(pool.map(act, range(CLIENTS)))
            return time.perf_counter() - started

        pairs = [(direct(), served()) for _ in range(int(os.environ.get("REFPLUG_REPEATS", "3")))]
    ours, theirs = (len(rows) / np.median(times) for times in zip(*pairs, strict=True))
    print(
        f"\n{len(rows)} rows of {TOKENS} tokens: engine {ours:.1f} rows/s, {CLIENTS} clients of the server "
        f"{theirs:.1f} rows/s: {theirs / ours:.2f}x"
    )


@pytest.mark.parametrize("rows", [1, 4, 8, 16, 32])
def test_bytes_per_token(path, work, rows, served):
    generator = np.random.default_rng(rows)
    with transport(served) as to:
        client = RefPlugClient(to)
        stats = to.stats
        stats.bytes_sent = stats.bytes_received = 0
        for _ in range(4):
            ids = generator.integers(0, 49152, (rows, TOKENS))
            client.score(PaddedRows.flush_left([Row(row, row) for row in ids]), 1.0)
        tokens = 4 * rows * TOKENS
        sent, received = stats.bytes_sent / tokens, stats.bytes_received / tokens
        print(f"\n{rows} rows: {sent:.2f} sent + {received:.2f} received = {sent + received:.2f} bytes a token")
        assert sent + received <= 6


@pytest.fixture(scope="module")
def served(path):
    with ServerProcess(path, "--port", "0") as server:
        yield server.wait()
