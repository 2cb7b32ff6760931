"""DeepSpeed ZeRO-2 and ZeRO-3 on the CPU, each group of runs in a process of its own."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trl_refplug.identity import digest_model

from .. import tiny


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
