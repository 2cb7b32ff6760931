"""Run by test_ema_checkpoints.py: one training run in a process of its own, killed after a step if asked to be."""

import json
import os
import signal
import sys
from pathlib import Path

from datasets import disable_progress_bars
from peft import LoraConfig
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

from tests.trainers.runs import build


class Die(TrainerCallback):
    """Dies once a step is over and before it is saved."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    disable_progress_bars()
    job, out, die_after = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    kwargs = {}
    if job.get("lora"):
        kwargs["peft_config"] = LoraConfig(task_type="CAUSAL_LM", **job["lora"])
    set_seed(0)  # a new adapter is as random as any other weight
    trainer = build(job.get("kind", "dpo"), out, job["model"], args=job["args"], **kwargs)
    if die_after:
        trainer.add_callback(Die(die_after))
    trainer.train(resume_from_checkpoint=get_last_checkpoint(out) if out.exists() else None)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    sums = {name: p.double().sum().item() for name, p in trainer.model.named_parameters()}
    result = {"losses": losses, "weights": sums, **trainer.ref_model.provider.metadata()}
    (out / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
