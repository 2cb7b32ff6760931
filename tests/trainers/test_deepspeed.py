"""DeepSpeed ZeRO-2 and ZeRO-3 on the CPU, each group of runs in a process of its own."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trl_refplug.cli import launched
from trl_refplug.cli.tasks import Precompute
from trl_refplug.models.identity import digest_model
from trl_refplug.store import summarize

from .. import tiny
from .runs import zero


pytestmark = [
    pytest.mark.deepspeed,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="deepspeed is not installed: pip install 'trl-refplug[deepspeed]'",
    ),
]
ROOT = Path(__file__).parents[2]


def run(tmp_path, *jobs):
    """Run `jobs` one after another under DeepSpeed; what each of them gave."""
    common = {"kind": "dpo", "model": tiny.saved(tmp_path), "out": str(tmp_path / "out")}
    results = tmp_path / "results.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", "tests.trainers.deepspeed_runs"]
    command += [json.dumps([{**common, **job} for job in jobs]), str(results)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(results.read_text())


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_frozen_equals_trl(tmp_path, kind, stage):
    job = {"kind": kind, "stage": stage}
    theirs, *ours = run(tmp_path, {**job, "ours": False}, job, {**job, "policy": "instance"})
    assert theirs["logs"]
    for result in ours:
        assert result["logs"] == theirs["logs"]


@pytest.mark.parametrize("provider", ["frozen", "adapter"])
def test_packed_scoring_equals_exact(tmp_path, provider):
    job = {"stage": 3, "lora": provider == "adapter"}
    packing = {"args": {"ref_provider": provider, "ref_provider_kwargs": {"scoring": "packed"}}}
    exact, packed = run(tmp_path, {**job, "args": {"ref_provider": provider}}, {**job, **packing})
    assert exact["logs"]
    assert (exact["packed"], packed["packed"]) == (False, True)
    for ours, theirs in zip(packed["logs"], exact["logs"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


@pytest.mark.parametrize("policy", ["instance", "unsharded instance"])
@pytest.mark.parametrize("stage", [2, 3])
def test_an_edited_policy_is_its_own_reference(tmp_path, stage, policy):
    edited, plain = run(tmp_path, {"stage": stage, "policy": policy, "edit": True}, {"stage": stage, "policy": policy})
    assert edited["logs"][0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert edited["reference"] != plain["reference"]


def test_digest_is_that_of_the_whole_model(tmp_path):
    (result,) = run(tmp_path, {"stage": 3, "policy": "instance"})
    assert result["digest"] == result["reference"] == digest_model(tiny.model())


@pytest.mark.parametrize("provider", ["adapter", "frozen"])
def test_lora_equals_trl(tmp_path, provider):
    job = {"stage": 3, "lora": True}
    flag = {"args": {"ref_provider": provider}}
    theirs, *ours = run(tmp_path, {**job, "ours": False}, {**job, **flag}, {**job, **flag, "policy": "instance"})
    for result in ours:
        assert result["logs"] == theirs["logs"]


def test_a_trained_adapter_is_its_own_reference(tmp_path):
    job = {"stage": 3, "policy": "instance", "trained_adapter": True}
    base = {"ref_provider": "adapter", "ref_provider_kwargs": {"start": "base"}}
    theirs, ours, against_base = run(tmp_path, {**job, "ours": False}, job, {**job, "args": base})
    assert ours["logs"] == theirs["logs"]
    assert against_base["logs"][0]["loss"] != pytest.approx(math.log(2), abs=1e-3)


def test_resume(tmp_path):
    saving = {"stage": 3, "args": {"save_strategy": "steps", "save_steps": 1}}
    whole, resumed = run(tmp_path, saving, {"stage": 3, "resume": str(tmp_path / "out" / "checkpoint-1")})
    for result in (whole, resumed):
        for entry in result["logs"]:
            del entry["num_tokens"]  # TRL starts counting anew
    assert resumed["logs"] == whole["logs"]
    assert resumed["reference"] == whole["reference"]


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("lora", [False, True])
def test_a_policy_fills_a_store(tmp_path, lora, stage):
    store = tmp_path / "store"
    using = {"ref_provider": "cached", "ref_provider_kwargs": {"path": str(store)}}
    never = {"ref_provider": "cached", "ref_provider_kwargs": {"path": str(store), "fill": "never"}}
    job = {"stage": stage, "lora": lora}
    frozen, filling, filled = run(tmp_path, job, {**job, "args": using}, {**job, "args": never})
    assert summarize(store).rows == 24
    for ours, theirs in zip(filling["logs"], frozen["logs"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    assert filled["logs"] == filling["logs"]


@pytest.mark.parametrize("stage", [2, 3])
def test_a_policy_that_deepspeed_rounds_fills_a_store(tmp_path, stage):
    options = {"path": str(tmp_path / "store")}
    job = {"stage": stage, "args": {"bf16": True, "ref_provider": "cached", "ref_provider_kwargs": options}}
    filling, again = run(tmp_path, job, job)
    assert summarize(tmp_path / "store").rows == 24
    assert filling["logs"][0]["loss"] == pytest.approx(math.log(2), abs=0.05)
    assert again["logs"] == filling["logs"]


def test_precompute(tmp_path):
    data, settings, store = (str(tmp_path / name) for name in ("data.jsonl", "zero.json", "store"))
    tiny.preference_data().to_json(data)
    Path(settings).write_text(json.dumps(zero(3)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", launched.__file__, Precompute().encode(), "dpo", "--bf16", "false"]
    command += ["--model_name_or_path", tiny.saved(tmp_path), "--dataset_name", data, "--deepspeed", settings]
    command += ["--output_dir", str(tmp_path / "out"), "--report_to", "none", "--use_cpu"]
    command += ["--ref_provider_kwargs", json.dumps({"path": store})]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "HF_DATASETS_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(f"All rows of this run are in {store}.") == 1
    assert summarize(store).rows == 24
    assert not list((tmp_path / "out").glob("checkpoint-*"))


EMA = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.3, "ref_model_sync_steps": 2, "max_steps": 4}


@pytest.mark.parametrize("stage", [2, 3])
def test_ema_equals_trl(tmp_path, stage):
    """TRL gathers both models for a sync under ZeRO-3; here every rank moves its own shards."""
    job = {"stage": stage, "args": EMA}
    theirs, ours = run(tmp_path, {**job, "ours": False}, job)
    assert len(theirs["logs"]) > 0
    assert ours["logs"] == theirs["logs"]


@pytest.mark.parametrize("lora", [False, True])
def test_ema_goes_on_as_if_never_stopped(tmp_path, lora):
    args = {**EMA, "save_strategy": "steps", "save_steps": 1}
    resume = [str(tmp_path / "out" / f"checkpoint-{step}") for step in (1, 2)]
    job = {"stage": 3, "lora": lora}
    whole, *resumed = run(
        tmp_path, {**job, "args": args}, *({**job, "args": EMA, "resume": checkpoint} for checkpoint in resume)
    )
    for result in resumed:
        assert [entry["loss"] for entry in result["logs"]] == [entry["loss"] for entry in whole["logs"]]
