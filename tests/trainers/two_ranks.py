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


REFERENCES = {"PerRank": PerRank, "BrokenOnOne": BrokenOnOne, "Ahead": Ahead}


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
    if job.get("reference") == "Ahead":
        kwargs["reference"].trainer = trainer
    trainer.train()
    done = finished(trainer)
    sums = {name.removeprefix("module."): p.double().sum().item() for name, p in done.weights.items()}
    asked = getattr(kwargs.get("reference"), "asked", [])
    return {"logs": done.logs, "sums": sums, "ahead": len(asked)}


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
