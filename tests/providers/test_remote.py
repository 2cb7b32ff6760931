"""`remote` gives the numbers of `frozen`, from a server, for every trainer."""

import dataclasses
import logging
import math
import os
import signal
import time

import msgspec
import numpy as np
import psutil
import pytest
import torch
import trustme
from peft import LoraConfig, PeftModel, get_peft_model
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from transformers import AutoModelForCausalLM

from trl_refplug import (
    ConfigurationError,
    ReferenceBatch,
    ReferenceMismatchError,
    RemoteError,
    UnsupportedInputError,
)
from trl_refplug.rows import PaddedRows
from trl_refplug.serving import Engine, ServerLimits, load_engine

from .. import tiny
from ..serving.servers import LifespanOf, engine, free_port, serving
from ..trainers.runs import assert_same, build, train
from .test_cached import assert_close, lora


@pytest.fixture(scope="module")
def exact():
    with serving(engine(scoring="exact")) as url:
        yield url


@pytest.fixture(scope="module")
def packed():
    with serving(engine()) as url:
        yield url


def remote(url, **options):
    return {"ref_provider": "remote", "ref_provider_kwargs": {"url": url, **options}}


def trained_adapter(directory):
    """A policy that comes with an adapter that changes its values. The adapter alone is saved in `adapter`."""
    path = tiny.saved(directory)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(path), LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(directory / "adapter")
    base = AutoModelForCausalLM.from_pretrained(path)
    return PeftModel.from_pretrained(base, directory / "adapter", is_trainable=True)


def used(directory, url):
    """Gives the provider of a trainer. The trainer is kept as long as the test runs."""
    trainer = build("dpo", directory, tiny.model(), args=remote(url))
    provider = trainer.ref_model.provider
    provider.trainer = trainer
    return provider


def random_batch(seed):
    """Three rows of different lengths, padded on the right, the second half scored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, 250, (3, 12), generator=generator)
    mask = (torch.arange(12) < torch.tensor([[12], [9], [7]])).long()
    labels = ids.masked_fill((mask == 0) | (torch.arange(12) < 5), -100)
    return ReferenceBatch(ids, mask, labels)


class TestSameTraining:
    @pytest.mark.parametrize("kind", ["dpo", "kto", "grpo", "rloo"])
    def test_exact_is_frozen_bit_for_bit(self, kind, tmp_path, exact):
        path = tiny.saved(tmp_path)
        frozen = train(kind, tmp_path, path, args={"ref_provider": "frozen"})
        state = torch.get_rng_state()
        ours = train(kind, tmp_path, path, args=remote(exact))
        assert_same(ours, frozen)
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("architecture", ["gpt2", "mixtral", "gemma2"])
    def test_exact_whatever_padding_does(self, architecture, tmp_path):
        """GRPO pads on the left. The positions of GPT-2 and the load of experts depend on that."""
        path = tiny.saved(tmp_path, architecture)
        frozen = train("grpo", tmp_path, path, args={"ref_provider": "frozen"})
        with serving(engine(architecture, scoring="exact")) as url:
            assert_same(train("grpo", tmp_path, path, args=remote(url)), frozen)

    @pytest.mark.parametrize("kind", ["dpo", "grpo"])
    def test_packed_is_frozen_up_to_rounding(self, kind, tmp_path, packed):
        path = tiny.saved(tmp_path)
        frozen = train(kind, tmp_path, path, args={"ref_provider": "frozen"})
        assert_close(train(kind, tmp_path, path, args=remote(packed)), frozen)

    def test_gpt2_padded_on_the_left_and_packed(self, tmp_path):
        path = tiny.saved(tmp_path, "gpt2")
        frozen = train("grpo", tmp_path, path, args={"ref_provider": "frozen"})
        with serving(engine("gpt2")) as url:
            assert_close(train("grpo", tmp_path, path, args=remote(url)), frozen)

    def test_lora_policy_against_its_base(self, tmp_path, exact):
        path = tiny.saved(tmp_path)
        adapter = train("dpo", tmp_path, path, args={"ref_provider": "adapter"}, peft_config=lora())
        assert_same(train("dpo", tmp_path, path, args=remote(exact), peft_config=lora()), adapter)

    def test_trained_adapter_against_itself(self, tmp_path):
        policy = trained_adapter(tmp_path)
        frozen = train("dpo", tmp_path, policy, args={"ref_provider": "adapter"})
        with serving(load_engine(str(tmp_path / "adapter"), scoring="exact")) as url:
            ours = train("dpo", tmp_path, policy, args=remote(url))
        assert ours.logs == frozen.logs  # only the logs: a run of `adapter` has more weights, a copy of the adapter

    def test_another_reference_by_name(self, tmp_path):
        other = tiny.model(seed=5)
        other.save_pretrained(tmp_path / "other")
        named = {"ref_provider": "frozen", "ref_provider_kwargs": {"model": str(tmp_path / "other")}}
        frozen = train("dpo", tmp_path, tiny.model(), args=named)
        with serving(engine(seed=5, scoring="exact")) as url:
            ours = train("dpo", tmp_path, tiny.model(), args=remote(url, starts_as_policy=False))
        assert_same(ours, frozen)

    def test_mixed_precision_of_the_trainer_is_not_the_servers(self, tmp_path, packed):
        path = tiny.saved(tmp_path)
        identities = []
        for precision in ({}, {"bf16": True}):
            ours = train("dpo", tmp_path, path, args={**remote(packed), **precision})
            assert abs(ours.logs[0]["loss"] - math.log(2)) < 0.01
            identities.append(ours.trainer.ref_model.provider.identity().digest)
        frozen = train("dpo", tmp_path, path, args={"ref_provider": "frozen"})
        assert identities[0] == frozen.trainer.ref_model.provider.identity().digest
        assert identities[1] != identities[0]  # or a store would take one for the other

    @pytest.mark.parametrize("fill", ["ahead", "lazy"])
    def test_source_of_cached(self, fill, tmp_path, packed):
        path = tiny.saved(tmp_path)
        frozen = train("dpo", tmp_path, path, args={"ref_provider": "frozen"})
        options = {"path": str(tmp_path / "store"), "source": "remote", "source_kwargs": {"url": packed}, "fill": fill}
        filled = train("dpo", tmp_path, path, args={"ref_provider": "cached", "ref_provider_kwargs": options})
        assert_close(filled, frozen)
        again = train("dpo", tmp_path, path, args={"ref_provider": "cached", "ref_provider_kwargs": options})
        assert_same(again, filled)
        assert again.trainer.ref_model.provider.counters()["misses"] == 0

    def test_resumes_against_the_same_reference_only(self, tmp_path, exact):
        path = tiny.saved(tmp_path)
        saving = {"save_strategy": "steps", "save_steps": 2}
        train("dpo", tmp_path / "run", path, args={**remote(exact), **saving})
        resumed = build("dpo", tmp_path / "run", path, args={**remote(exact), "max_steps": 4})
        resumed.train(resume_from_checkpoint=True)
        with serving(engine(seed=5)) as url:
            other = build("dpo", tmp_path / "run", path, args=remote(url, starts_as_policy=False))
            with pytest.raises(ReferenceMismatchError, match="was trained against"):
                other.train(resume_from_checkpoint=True)


class TestAnswers:
    def test_submitted_batches_are_answered_in_any_order(self, tmp_path, exact):
        provider = used(tmp_path, exact)
        batches = [random_batch(seed) for seed in range(12)]
        futures = [provider.submit(batch) for batch in batches]
        for batch, future in reversed(list(zip(batches, futures, strict=True))):
            assert torch.equal(future.result(30), provider.log_probs(batch))

    def test_answers_are_the_callers_to_change(self, tmp_path, exact):
        provider = used(tmp_path, exact)
        batch = random_batch(0)
        first = provider.log_probs(batch)
        kept = first.clone()
        first.zero_()
        assert torch.equal(provider.log_probs(batch), kept)

    def test_counters_reach_the_logs(self, tmp_path, exact):
        trainer = build("dpo", tmp_path, tiny.model(), args=remote(exact))
        trainer.train()
        logged = trainer.state.log_history[-2]
        assert logged["ref/bytes_per_token"] > 0
        assert logged["ref/request_seconds"] > 0
        assert logged["ref/retries"] == 0

    def test_a_closed_provider_answers_no_more(self, tmp_path, exact):
        provider = used(tmp_path, exact)
        provider.close()
        provider.close()
        with pytest.raises(RemoteError, match="closed"):
            provider.log_probs(random_batch(0))

    def test_a_fork_has_its_own_connections(self, tmp_path, exact):
        provider = used(tmp_path, exact)
        client = provider._client
        asked = [PaddedRows.from_batch(random_batch(seed)) for seed in range(2)]
        expected = [client.score(rows, 1.0) for rows in asked]

        def undisturbed(number):
            answers = [client.score(asked[number], 1.0) for _ in range(50)]
            same = all(
                np.array_equal(a, b) for values in answers for a, b in zip(values, expected[number], strict=True)
            )
            return same and client.transport.stats.retries == 0

        child = os.fork()
        if not child:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(60)
            try:
                os._exit(0 if undisturbed(1) else 1)
            finally:
                os._exit(2)
        assert undisturbed(0)
        assert os.waitpid(child, 0)[1] == 0

    def test_row_that_the_server_cannot_score(self, tmp_path, exact):
        provider = used(tmp_path, exact)
        batch = random_batch(0)
        batch.input_ids[1, 3] = batch.labels[1, 3] = 100_000
        with pytest.raises(UnsupportedInputError, match=r"1 of 3 rows.*row 1: token id 100000 is not in.*max_length"):
            provider.log_probs(batch)

    def test_vision_is_refused(self, tmp_path, exact):
        provider = used(tmp_path, exact)
        batch = dataclasses.replace(random_batch(0), extras={"pixel_values": torch.zeros(1)}, rows_sliceable=False)
        with pytest.raises(UnsupportedInputError, match="pixel_values"):
            provider.log_probs(batch)


class TestWrongServer:
    def test_other_weights(self, tmp_path):
        with serving(engine(seed=5)) as url, pytest.raises(ReferenceMismatchError, match="starts_as_policy=false"):
            build("dpo", tmp_path, tiny.model(), args=remote(url))

    def test_a_server_that_is_refused_is_left_in_peace(self, tmp_path):
        with serving(engine(seed=5)) as url:
            with pytest.raises(ReferenceMismatchError) as refused:
                build("dpo", tmp_path, tiny.model(), args=remote(url))
            port = int(url.rsplit(":", 1)[1])
            connected = [c for c in psutil.Process().net_connections("tcp") if c.raddr and c.raddr.port == port]
            assert not any(connection.status == psutil.CONN_ESTABLISHED for connection in connected)
        assert refused  # as in a notebook, the traceback is kept, and all that was made with it

    def test_other_precision_says_how_to_serve(self, tmp_path):
        policy = tiny.model().bfloat16()
        with serving(engine()) as url, pytest.raises(ReferenceMismatchError, match="--dtype bfloat16"):
            build("dpo", tmp_path, policy, args=remote(url))

    def test_restarted_with_other_weights_while_training(self, tmp_path):
        port = free_port()
        with serving(engine(), port=port) as url:
            provider = used(tmp_path, url)
            provider.log_probs(random_batch(0))
        with serving(engine(seed=5), port=port), pytest.raises(ReferenceMismatchError, match="restarted with other"):
            provider.log_probs(random_batch(0))

    def test_replicas_of_different_weights(self, tmp_path):
        different = pytest.raises(ReferenceMismatchError, match="different references")
        with serving(engine()) as one, serving(engine(seed=5)) as two, different:
            build("dpo", tmp_path, tiny.model(), args=remote([one, two]))

    def test_other_tokenizer(self, tmp_path):
        served = engine(seed=5)
        served.served_model = msgspec.structs.replace(served.served_model, tokenizer="0123456789abcdef")
        with serving(served) as url, pytest.raises(ReferenceMismatchError, match="ids stand for"):
            build("dpo", tmp_path, tiny.model(), args=remote(url, starts_as_policy=False))

    def test_no_tokenizer_to_compare(self, tmp_path, caplog):
        with serving(engine()) as url:
            used(tmp_path, url)
        assert "without a tokenizer" not in caplog.text
        with serving(Engine(tiny.model(), "bare")) as url:
            used(tmp_path, url)
        assert f"{url} serves bare without a tokenizer" in caplog.text

    def test_smaller_vocabulary(self, tmp_path):
        served = Engine(tiny.model(seed=5, vocab_size=100), "small")
        with serving(served) as url, pytest.raises(ReferenceMismatchError, match="only 100"):
            build("dpo", tmp_path, tiny.model(), args=remote(url, starts_as_policy=False))

    def test_float32_head_on_a_bfloat16_server(self, tmp_path):
        served = Engine(tiny.model(seed=5).bfloat16(), "bfloat16")
        with serving(served) as url:
            arguments = {**remote(url, starts_as_policy=False), "cast_lm_head_to_fp32": True}
            with pytest.raises(ConfigurationError, match="cast_lm_head_to_fp32"):
                build("grpo", tmp_path, tiny.model(), args=arguments)

    def test_something_else(self, tmp_path):
        async def app(scope, receive, send):
            await PlainTextResponse("hello")(scope, receive, send)

        refused = pytest.raises(RemoteError, match=r"does not speak the protocol.*protocol='vllm'")
        with serving(engine(), around=lambda ours: LifespanOf(ours, app)) as url, refused:
            build("dpo", tmp_path, tiny.model(), args=remote(url))

    def test_a_server_of_the_other_protocol(self, tmp_path):
        refused = pytest.raises(RemoteError, match=r"refused /v1/identity \(404\).*options 'url' and 'protocol'")
        with serving(engine(), around=lambda ours: LifespanOf(ours, Starlette())) as url, refused:
            build("dpo", tmp_path, tiny.model(), args=remote(url))

    def test_a_batch_beyond_the_limits(self, tmp_path):
        some = random_batch(0)
        batch = ReferenceBatch(
            *(torch.cat([each, each]) for each in (some.input_ids, some.attention_mask, some.labels))
        )
        with serving(engine(), limits=ServerLimits(max_rows=4)) as url:
            provider = used(tmp_path, url)
            with pytest.raises(RemoteError, match=r"too many rows: 6, at most 4.*per_device_train_batch_size"):
                provider.log_probs(batch)

    def test_nobody_there(self, tmp_path):
        url = f"http://127.0.0.1:{free_port()}"
        started = time.monotonic()
        with pytest.raises(RemoteError, match=r"within 1 s .option 'deadline'.*cannot be reached"):
            build("dpo", tmp_path, tiny.model(), args=remote(url, deadline=1))
        assert time.monotonic() - started < 60


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "'url' is required"),
            ({"url": "localhost:8321"}, r"'localhost:8321'; expected an address such as"),
            ({"url": "http://host:port"}, "expected an address"),
            ({"url": []}, "empty"),
            ({"url": "http://user:secret@host:1"}, "credentials for host"),
            ({"url": ["http://host:1", "http://host:1/"]}, "twice"),
            ({"url": "http://host:1", "model": "m"}, "protocol='vllm'"),
            ({"url": "http://host:1", "deadline": 0}, "above 0"),
            ({"url": "http://host:1", "read_timeout": math.inf}, "finite"),
            ({"url": "http://host:1", "api_key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY.*not set"),
            ({"url": "http://host:1", "protocl": "vllm"}, "Did you mean 'protocol'"),
        ],
    )
    def test_wrong_ones_are_refused_before_anything_is_loaded(self, options, message, tmp_path):
        with pytest.raises(ConfigurationError, match=message) as raised:
            build("dpo", tmp_path, "no/such-model", args={"ref_provider": "remote", "ref_provider_kwargs": options})
        assert "secret" not in str(raised.value)

    @pytest.mark.parametrize("key", ["s3cret\nk3y", "s3cret k3y", "s3crét"])
    def test_a_key_that_http_would_refuse_is_refused_unseen(self, key, tmp_path, monkeypatch):
        monkeypatch.setenv("REFERENCE_KEY", key)
        with pytest.raises(ConfigurationError, match=r"'REFERENCE_KEY', which has no key in it") as raised:
            build("dpo", tmp_path, "no/such-model", args=remote("http://host:1", api_key_env="REFERENCE_KEY"))
        assert "s3cr" not in str(raised.value)

    def test_the_key_is_nowhere_to_be_seen(self, tmp_path, monkeypatch, caplog):
        monkeypatch.setenv("REFERENCE_KEY", "s3cret-k3y")
        caplog.set_level(logging.DEBUG)
        port = free_port()
        options = {"api_key_env": "REFERENCE_KEY", "starts_as_policy": True}
        with serving(engine(), key="s3cret-k3y", port=port) as url:
            arguments = {**remote(url, **options), "save_strategy": "steps", "save_steps": 3}
            trainer = build("dpo", tmp_path / "out", tiny.saved(tmp_path), args=arguments)
            trainer.train()
        provider = trainer.ref_model.provider
        provider._client.transport._deadline = 1
        with pytest.raises(RemoteError) as raised:
            provider.log_probs(random_batch(0))
        written = "".join(p.read_text(errors="replace") for p in (tmp_path / "out").rglob("*") if p.suffix == ".json")
        assert "REFERENCE_KEY" in (tmp_path / "out/checkpoint-3/refplug/reference.json").read_text() or written
        for text in (
            written,
            caplog.text,
            str(raised.value),
            repr(provider._client.transport),
            repr(provider.options),
        ):
            assert "s3cret" not in text

    def test_certificates_are_verified(self, tmp_path, monkeypatch):
        authority = trustme.CA()
        authority.cert_pem.write_to_path(tmp_path / "authority.pem")
        authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
        files = {"ssl_certfile": tmp_path / "server.pem", "ssl_keyfile": tmp_path / "server.pem"}
        with serving(engine(), **files) as url:
            started = time.monotonic()
            with pytest.raises(RemoteError, match=r"cannot be verified.*SSL_CERT_FILE"):
                build("dpo", tmp_path, tiny.model(), args=remote(url))
            assert time.monotonic() - started < 60  # the deadline is 300, but trying again is of no use
            monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
            used(tmp_path, url).log_probs(random_batch(0))

    @pytest.mark.parametrize("key", [None, "wrong"])
    def test_wrong_key(self, key, tmp_path, monkeypatch):
        if key:
            monkeypatch.setenv("REFERENCE_KEY", key)
        with serving(engine(), key="right") as url, pytest.raises(RemoteError, match=r"refused the key \(401\)"):
            build("dpo", tmp_path, tiny.model(), args=remote(url, api_key_env="REFERENCE_KEY" if key else None))

    def test_vllm_at_another_temperature_is_refused_at_once(self, tmp_path):
        options = {"url": "http://127.0.0.1:1", "protocol": "vllm"}
        with pytest.raises(ConfigurationError, match=r"temperature=0\.7"):
            build("grpo", tmp_path, "no/such-model", args={"ref_provider": "remote", "ref_provider_kwargs": options})
