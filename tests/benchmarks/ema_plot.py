"""
The plot of docs/providers/ema.md: three short DPO runs that differ only in how their reference moves.

    python -m tests.benchmarks.ema_plot docs/providers/ema.svg
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from tests import tiny
from trl_refplug import RefPlugDPOConfig, RefPlugDPOTrainer


STEPS = 240
RUNS = {
    "fixed (alpha 0)": {"alpha": 0.0, "sync_steps": 1},
    "soft (alpha 0.6, sync_steps 32)": {"alpha": 0.6, "sync_steps": 32},
    "hard (alpha 1, sync_steps 64)": {"alpha": 1.0, "sync_steps": 64},
}
SHOWN = {
    "ref/distance": "distance of policy and reference,\nrelative to the policy's norm",
    "ref/log_ratio": "mean log-ratio per token, nats",
    "rewards/margins": "reward margin of the batch",
}


def logs(options: dict[str, Any], out: str) -> list[dict[str, float]]:
    args = RefPlugDPOConfig(
        output_dir=out,
        ref_provider="ema",
        ref_provider_kwargs=options,
        max_steps=STEPS,
        per_device_train_batch_size=8,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        logging_steps=2,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    trainer = RefPlugDPOTrainer(
        model=tiny.model("llama", hidden_size=64, intermediate_size=128),
        args=args,
        train_dataset=tiny.preference_data(64),
        processing_class=tiny.tokenizer(),
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def main(path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "ema"  # the same file for the same numbers
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(SHOWN), figsize=(12, 3.6), layout="constrained")
    for label, options in RUNS.items():
        with tempfile.TemporaryDirectory() as out:
            entries = logs(options, out)
        for axis, name in zip(axes, SHOWN, strict=True):
            axis.plot([e["step"] for e in entries], [e[name] for e in entries], label=label, linewidth=1.2)
    for axis, title in zip(axes, SHOWN.values(), strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
