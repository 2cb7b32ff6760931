"""`remote` with `protocol="vllm"`: the server does not say which model it has, so its answers have to show it."""

import os
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch

from trl_refplug import (
    ConfigurationError,
    InvalidLogProbsError,
    ReferenceBatch,
    ReferenceMismatchError,
    RemoteError,
    UnsupportedInputError,
)

from .. import tiny
from ..serving.completions import Completions
from ..serving.servers import LifespanOf, engine, free_port, serving
from ..trainers.runs import build, train
from .test_cached import assert_close, lora
from .test_remote import random_batch


def remote(url, **options):
    return {"ref_provider": "remote", "ref_provider_kwargs": {"url": url, "protocol": "vllm", **options}}


def completing(completions, port=0):
    """The URL of a server of [`Completions`], on a real socket."""
    return serving(engine(), port=port, around=lambda ours: LifespanOf(ours, completions.app))


def tiny_server(seed=0, **options):
    return Completions(tiny.model(seed=seed).eval(), **options)


def used(directory, url, **options):
    trainer = build("dpo", directory, tiny.model(), args=remote(url, **options))
    provider = trainer.ref_model.provider
    provider.trainer = trainer
    return provider


@pytest.mark.parametrize("kind", ["dpo", "kto", "grpo"])
def test_training_as_with_frozen(kind, tmp_path):
    path = tiny.saved(tmp_path)
    args = {"temperature": 1.0} if kind == "grpo" else {}
    frozen = train(kind, tmp_path, path, args={"ref_provider": "frozen", **args})
    with completing(tiny_server()) as url:
        assert_close(train(kind, tmp_path, path, args={**remote(url), **args}), frozen)


def test_lora_and_cached_and_reordered_choices(tmp_path):
    path = tiny.saved(tmp_path)
    plain = train("dpo", tmp_path, path, args={"ref_provider": "adapter"}, peft_config=lora())
    with completing(tiny_server(wrong="reordered")) as url:
        kwargs = {
            "path": str(tmp_path / "store"),
            "source": "remote",
            "source_kwargs": {"url": url, "protocol": "vllm"},
        }
        args = {"ref_provider": "cached", "ref_provider_kwargs": kwargs}
        assert_close(train("dpo", tmp_path, path, args=args, peft_config=lora()), plain)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ("ignores", RemoteError, "ignores `prompt_logprobs`"),
        ("shifted", RemoteError, "the first null"),
        ("truncates", RemoteError, "other tokens than it was sent"),
        ("other tokens", RemoteError, r"no log-prob of token \d+ at position"),
        ("not finite", InvalidLogProbsError, r"-9999\.0"),
    ],
)
def test_servers_that_cannot_serve_a_reference(wrong, error, message, tmp_path):
    with completing(tiny_server(wrong=wrong)) as url, pytest.raises(error, match=message):
        used(tmp_path, url)


def test_another_model_than_the_policy(tmp_path):
    with completing(tiny_server(seed=5)) as url:
        with pytest.raises(
            ReferenceMismatchError,
            match=r"differ from those of the policy as it was passed in.*starts_as_policy=false",
        ):
            used(tmp_path, url)
        used(tmp_path, url, starts_as_policy=False)


def test_another_model_after_a_restart(tmp_path):
    port = free_port()
    with completing(tiny_server(), port=port) as url:
        provider = used(tmp_path, url)
        provider.log_probs(random_batch(0))
    changed = pytest.raises(ReferenceMismatchError, match="was restarted with another model")
    with completing(tiny_server(seed=5), port=port), changed:
        provider.log_probs(random_batch(0))


def test_another_model_in_a_resumed_run(tmp_path):
    args = {"save_strategy": "steps", "save_steps": 1}
    with completing(tiny_server()) as url:
        train("dpo", tmp_path, tiny.model(), args={**remote(url, starts_as_policy=False), **args})
        again = build("dpo", tmp_path, tiny.model(), args=remote(url, starts_as_policy=False))
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    with completing(tiny_server(seed=5)) as url:
        other = build("dpo", tmp_path, tiny.model(), args=remote(url, starts_as_policy=False))
        with pytest.raises(
            ReferenceMismatchError,
            match=r"model=ref.*resumed.*differ from those of the reference that the run was started with",
        ):
            other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("fill", ["ahead", "lazy", "never"])
def test_another_model_for_a_store(fill, tmp_path):
    def cached(url, fill):
        source = {"url": url, "protocol": "vllm", "starts_as_policy": False}
        options = {"path": str(tmp_path / "store"), "fill": fill, "source": "remote", "source_kwargs": source}
        return {"ref_provider": "cached", "ref_provider_kwargs": options}

    with completing(tiny_server()) as url:
        train("dpo", tmp_path, tiny.model(), args=cached(url, "lazy"))
        train("dpo", tmp_path, tiny.model(), args=cached(url, fill))
    refused = pytest.raises(
        ReferenceMismatchError, match=r"log-probs of a reference that goes by the same identity.*model=ref"
    )
    with completing(tiny_server(seed=5)) as url, refused:
        build("dpo", tmp_path, tiny.model(), args=cached(url, fill))


def test_replicas_of_different_models(tmp_path):
    different = pytest.raises(ReferenceMismatchError, match="has another reference than")
    with completing(tiny_server()) as one, completing(tiny_server(seed=5)) as two, different:
        used(tmp_path, [one, two])


def test_several_models_need_a_name(tmp_path):
    with completing(tiny_server(names=("a", "b"))) as url:
        with pytest.raises(RemoteError, match=r"serves a, b\. Name one"):
            used(tmp_path, url)
        with pytest.raises(RemoteError, match="names 'c'"):
            used(tmp_path, url, model="c")
        used(tmp_path, url, model="b")


def test_rows_that_are_too_long(tmp_path):
    with completing(tiny_server(max_length=30)) as url:
        provider = used(tmp_path, url)
        ids = torch.randint(6, 250, (1, 30))
        batch = ReferenceBatch(ids, torch.ones_like(ids), ids)
        with pytest.raises(UnsupportedInputError, match="--max-model-len 31"):
            provider.log_probs(batch)
        ids = ids[:, :29]
        provider.log_probs(ReferenceBatch(ids, torch.ones_like(ids), ids))


def test_replicas_of_different_limits(tmp_path):
    """Any of the servers may be asked, so the shortest limit counts for all of them."""
    ids = torch.randint(6, 250, (1, 30), generator=torch.Generator().manual_seed(0))
    with completing(tiny_server(max_length=30)) as short, completing(tiny_server(max_length=128)) as long:
        for urls in ([short, long], [long, short]):
            too_long = pytest.raises(UnsupportedInputError, match=f"too long for {short}.* --max-model-len 31")
            with too_long:
                used(tmp_path, urls).log_probs(ReferenceBatch(ids, torch.ones_like(ids), ids))


def test_replicas_of_different_names(tmp_path):
    different = pytest.raises(RemoteError, match=r"serves 'a', .* serves 'b'\. .*--served-model-name")
    with completing(tiny_server(names=("a",))) as one, completing(tiny_server(names=("b",))) as two, different:
        used(tmp_path, [one, two])


def test_padding_on_the_left_where_positions_count(tmp_path):
    server = Completions(tiny.model("gpt2").eval())
    with completing(server) as url:
        trainer = build("dpo", tmp_path, tiny.model("gpt2"), args=remote(url))
        batch = random_batch(0)
        flipped = ReferenceBatch(batch.input_ids.flip(1), batch.attention_mask.flip(1), batch.labels.flip(1))
        flipped.labels[:, 0] = -100
        flipped.labels[1:, :6] = -100
        with pytest.raises(UnsupportedInputError, match="padded on the left"):
            trainer.ref_model.provider.log_probs(flipped)


def test_a_refplug_server_is_no_completions_server(tmp_path):
    with serving(engine()) as url, pytest.raises(RemoteError, match=r"refused /v1/models \(404\)"):
        used(tmp_path, url)


def test_temperature_is_refused(tmp_path):
    with completing(tiny_server()) as url, pytest.raises(ConfigurationError, match=r"temperature=0\.7"):
        build("grpo", tmp_path, tiny.model(), args=remote(url))


# With a real vLLM. REFPLUG_VLLM_PYTHON: Python of an environment with vLLM; REFPLUG_VLLM_MODEL: path of a small model.


@pytest.fixture(scope="module")
def vllm(tmp_path_factory):
    if url := os.environ.get("REFPLUG_VLLM_URL"):
        yield url
        return
    port = free_port()
    log = tmp_path_factory.mktemp("vllm") / "log"
    model = os.environ["REFPLUG_VLLM_MODEL"]
    command = [
        *(os.environ["REFPLUG_VLLM_PYTHON"], "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", model, "--served-model-name", "ref", "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "float32", "--max-model-len", "1024", "--enforce-eager", "--max-num-seqs", "64"),
    ]
    threads = f"0-{(os.cpu_count() or 1) - 1}"
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": threads}
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        for _ in range(300):
            assert server.poll() is None, log.read_text()[-2000:]
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(60)


@pytest.mark.vllm
def test_a_real_server_is_within_1e_4_of_frozen(vllm, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_refplug.scoring import exact_log_probs
    from trl_refplug.scoring.exact import ensure_fused_head

    path = os.environ["REFPLUG_VLLM_MODEL"]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    trainer = build("dpo", tmp_path, model, args=remote(vllm), processing_class=tokenizer)
    provider = trainer.ref_model.provider
    ensure_fused_head(model, 1.0, False)
    text = "\n".join(p.read_text() for p in sorted((Path(__file__).parents[2] / "docs").glob("*.md")))
    ids = torch.tensor(tokenizer(text)["input_ids"])
    worst = 0.0
    for number in range(8):
        rows = ids[number * 800 : (number + 1) * 800].reshape(4, 200)
        labels = rows.clone()
        labels[:, :8] = -100  # a prompt: vLLM is less exact after the first token alone
        batch = ReferenceBatch(rows, torch.ones_like(rows), labels)
        worst = max(worst, (provider.log_probs(batch) - exact_log_probs(model, batch)).abs().max().item())
    print(f"largest difference {worst:.2g} nats per token over 32 rows of 192 scored tokens, {provider.counters()}")
    assert worst < 1e-4
