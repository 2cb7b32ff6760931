"""Run by test_deepspeed.py in a process of its own: short runs under DeepSpeed on the CPU; writes what they gave."""

import json
import sys
import warnings
from pathlib import Path

import deepspeed
import torch
import transformers
from datasets import disable_progress_bars
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from tests import tiny
from tests.trainers.runs import DATA, ONLINE, TRL, config, finished, trainer_class, zero
from trl_refplug.models.identity import digest_model
from trl_refplug.scoring import ExactFallbackWarning


def policy_of(job: dict, *, sharded: bool) -> str | torch.nn.Module:
    """What the job passes as `model`. Loaded once the arguments exist, a model is born sharded under ZeRO-3."""
    if job.get("policy", "path") == "path":
        return job["model"]
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="float32")
    parameters = list(model.parameters())
    assert all(hasattr(parameter, "ds_id") == sharded for parameter in parameters)
    if job.get("edit"):
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0, enabled=sharded), torch.no_grad():
            for parameter in parameters:
                parameter.mul_(1.3)
    if job.get("trained_adapter"):
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
    return model


def run(job: dict) -> dict:
    unset_hf_deepspeed_config()  # what the arguments of the run before have set for the whole process
    kind, ours = job["kind"], job.get("ours", True)
    kwargs = {"train_dataset": DATA[kind](), "processing_class": tiny.tokenizer()}
    if kind in ONLINE:
        kwargs["reward_funcs"] = tiny.length_reward
    if job.get("lora"):
        kwargs["peft_config"] = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    early = job.get("policy") == "unsharded instance"
    policy = policy_of(job, sharded=False) if early else None
    args = config(kind, Path(job["out"]), **job.get("args", {}), deepspeed=zero(job["stage"]), ddp_backend="gloo")
    if policy is None:
        policy = policy_of(job, sharded=job["stage"] == 3)
    digest = None if isinstance(policy, str) else digest_model(policy)
    trainer = (trainer_class(kind) if ours else TRL[kind])(model=policy, args=args, **kwargs)
    trainer.train(resume_from_checkpoint=job.get("resume"))
    scorer = getattr(trainer.ref_model.provider, "_scorer", None) if ours else None
    return {
        "packed": scorer is not None and scorer.stats.operations > 0,
        "logs": finished(trainer).logs,
        "digest": digest,
        "reference": trainer.ref_model.provider.identity().digest if ours else None,
    }


if __name__ == "__main__":
    deepspeed.ops.__compatible_ops__.clear()  # DeepSpeed would spend minutes compiling operators that are not needed
    disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("error", ExactFallbackWarning)  # what is to be packed is packed
    Path(sys.argv[2]).write_text(json.dumps([run(job) for job in json.loads(sys.argv[1])]))
