"""Run by test_distributed.py on two ranks: short training runs, and what the tests compare of them."""

import copy
import os
from pathlib import Path

import datasets
import torch
import transformers
from accelerate import state
from accelerate.utils import DistributedType
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from tests.trainers.ahead import Ahead
from tests.trainers.runs import DATA, build, finished
from trl_refplug import ReferenceIdentity, ReferenceProvider
from trl_refplug.cli import launched
from trl_refplug.cli.tasks import Precompute
from trl_refplug.providers.frozen import FrozenProvider


class PerRank(ReferenceProvider):
    """Another reference on every rank."""

    def identity(self):
        return ReferenceIdentity("per-rank", os.environ["RANK"])

    def log_probs(self, batch):
        return (batch.labels[:, 1:] != -100).float()


class BrokenOnOne(PerRank):
    def setup(self, context):
        if os.environ["RANK"] == "1":
            raise RuntimeError("the reference of rank 1 is on fire")


class AheadOnOne(Ahead):
    """On rank 1 the reference's device is the policy's."""

    def _has_own_device(self, context):
        return os.environ["RANK"] == "0"

    def log_probs(self, batch):
        return FrozenProvider.log_probs(self, batch)


REFERENCES = {"PerRank": PerRank, "BrokenOnOne": BrokenOnOne, "Ahead": Ahead, "AheadOnOne": AheadOnOne}

FSDP = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "state_dict_type": "SHARDED_STATE_DICT",
    },
}


def allow_fsdp_on_cpu() -> None:
    """PyTorch shards over gloo on the CPU; accelerate offers it on accelerators only, and goes by this name."""
    init = state.AcceleratorState.__init__

    def renamed(self, *args, **kwargs):
        if state.PartialState(cpu=True).distributed_type == DistributedType.MULTI_CPU:
            state.PartialState._shared_state["distributed_type"] = DistributedType.MULTI_NPU
        init(self, *args, **kwargs)

    state.AcceleratorState.__init__ = renamed


def edited(path: str) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    return model


def run(job: dict) -> dict:
    kwargs = {}
    if job.get("lora"):
        kwargs["peft_config"] = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    if job.get("rows"):
        kwargs["train_dataset"] = DATA[job["kind"]](job["rows"])
    if job.get("reference"):
        kwargs["reference"] = REFERENCES[job["reference"]]()
    if job.get("stream"):
        kwargs["train_dataset"] = DATA[job["kind"]](job["rows"]).to_iterable_dataset()
    if job.get("eval_rows"):
        kwargs["eval_dataset"] = DATA[job["kind"]](job["eval_rows"])
    args = {**job.get("args", {}), "ddp_backend": "gloo"}
    out = Path(job["out"]) / os.environ["RANK"]
    if job.get("fsdp"):
        state.AcceleratorState._reset_state(True)
        args, out = {**args, **copy.deepcopy(FSDP)}, Path(job["out"], "sharded")
    policy = edited(job["model"]) if job.get("edit") else job["model"]
    trainer = build(job["kind"], out, policy, ours=job["ours"], args=args, **kwargs)
    if job.get("reference", "").startswith("Ahead"):
        kwargs["reference"].trainer = trainer
    trainer.train(resume_from_checkpoint=job.get("resume"))
    done = finished(trainer)
    sums = {name.removeprefix("module."): p.double().sum().item() for name, p in done.weights.items()}
    reference = kwargs.get("reference")
    return {
        "logs": done.logs,
        "sums": sums,
        "sharded": any(isinstance(p, torch.distributed.tensor.DTensor) for p in done.weights.values()),
        "ahead": getattr(reference, "ahead", 0),
        "afresh": getattr(reference, "afresh", 0),
    }


def run_all(jobs: list[dict]) -> list[dict]:
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    if jobs[0].get("fsdp"):
        allow_fsdp_on_cpu()
    results = [run(job) for job in jobs]
    torch.distributed.barrier()
    return results


def precompute(arguments: list[str]) -> None:
    """What `trl-refplug precompute dpo` launches, with a policy that FSDP2 shards."""
    datasets.config.HF_DATASETS_CACHE = Path(os.environ["HF_DATASETS_CACHE"])  # read when imported, by another process
    allow_fsdp_on_cpu()
    launched.train("dpo", arguments, Precompute())
