"""Run by test_distributed.py under torchrun: short training runs on every rank; writes what the tests compare."""

import json
import os
import sys
from pathlib import Path

import torch
import transformers
from datasets import disable_progress_bars
from peft import LoraConfig

from tests.trainers.ahead import Ahead
from tests.trainers.runs import DATA, build, finished
from trl_refplug import ReferenceIdentity, ReferenceProvider
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
    args = {**job.get("args", {}), "ddp_backend": "gloo"}
    out = Path(job["out"]) / os.environ["RANK"]
    trainer = build(job["kind"], out, job["model"], ours=job["ours"], args=args, **kwargs)
    if job.get("reference", "").startswith("Ahead"):
        kwargs["reference"].trainer = trainer
    trainer.train()
    done = finished(trainer)
    sums = {name.removeprefix("module."): p.double().sum().item() for name, p in done.weights.items()}
    reference = kwargs.get("reference")
    return {
        "logs": done.logs,
        "sums": sums,
        "ahead": getattr(reference, "ahead", 0),
        "afresh": getattr(reference, "afresh", 0),
    }


def main() -> None:
    disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    jobs = json.loads(sys.argv[1])
    results = [run(job) for job in jobs]
    Path(jobs[0]["out"], f"rank{os.environ['RANK']}.json").write_text(json.dumps(results))
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
