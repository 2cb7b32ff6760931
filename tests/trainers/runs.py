"""Short training runs of TRL's trainers and of ours, comparable to the last bit."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RLOOTrainer

import trl_refplug

from .. import tiny


TRL = {"dpo": DPOTrainer, "kto": KTOTrainer, "grpo": GRPOTrainer, "rloo": RLOOTrainer}
DATA = {"dpo": tiny.preference_data, "kto": tiny.unpaired_data, "grpo": tiny.prompt_data, "rloo": tiny.prompt_data}
KINDS = list(TRL)
ONLINE = ("grpo", "rloo")
# Facts of a run that may differ between two runs with the same numbers.
_TIMES = ("time", "runtime", "second", "ref/")


@dataclass
class Run:
    logs: list[dict[str, float]]
    weights: dict[str, torch.Tensor]
    trainer: Any


def trainer_class(kind: str) -> Any:
    return getattr(trl_refplug, f"RefPlug{kind.upper()}Trainer")


def config(kind: str, out: Path, **overrides: Any) -> Any:
    values: dict[str, Any] = dict(
        output_dir=str(out),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    if kind in ONLINE:
        values.update(num_generations=2, max_completion_length=8, beta=0.1, temperature=0.7)
    return getattr(trl_refplug, f"RefPlug{kind.upper()}Config")(**{**values, **overrides})


def build(kind: str, out: Path, model: Any, *, ours: bool = True, cls: Any = None, **kwargs: Any) -> Any:
    """A trainer; `config` values in `args=dict(...)`, everything else goes to its `__init__`."""
    args = config(kind, out, **kwargs.pop("args", {}))
    values: dict[str, Any] = {"train_dataset": DATA[kind](), "processing_class": tiny.tokenizer(), **kwargs}
    if kind in ONLINE:
        values.setdefault("reward_funcs", tiny.length_reward)
    chosen = cls or (trainer_class(kind) if ours else TRL[kind])
    return chosen(model=copy.deepcopy(model), args=args, **copy.deepcopy(values))


def train(kind: str, out: Path, model: Any, *, ours: bool = True, **kwargs: Any) -> Run:
    trainer = build(kind, out, model, ours=ours, **kwargs)
    trainer.train()
    return finished(trainer)


def finished(trainer: Any) -> Run:
    logs = [
        {key: value for key, value in entry.items() if not any(part in key for part in _TIMES)}
        for entry in trainer.state.log_history
        if "train_runtime" not in entry
    ]
    return Run(logs, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}, trainer)


def assert_same(ours: Run, theirs: Run) -> None:
    """Every logged number and every weight, bit for bit."""
    assert len(theirs.logs) > 0
    assert ours.logs == theirs.logs
    assert ours.weights.keys() == theirs.weights.keys()
    different = [name for name, weight in theirs.weights.items() if not torch.equal(weight, ours.weights[name])]
    assert not different


def zero(stage: int) -> dict:
    """DeepSpeed's settings for a ZeRO stage."""
    return {
        # Persistent parameters stay whole; at 0 every one is sharded.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": "auto"},
    }
