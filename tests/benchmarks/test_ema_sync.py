"""How long a sync of the `ema` reference takes. Prints; run with `-m benchmark -s`."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.callbacks import SyncRefModelCallback

from trl_refplug.providers.ema.adapter_average import AdapterAverage
from trl_refplug.providers.ema.model_average import ModelAverage
from trl_refplug.providers.ema.provider import EmaOptions


pytestmark = pytest.mark.benchmark

ROUNDS = 15


def model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The shape of SmolLM2-135M, random."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def alternating(*actions: Callable[[], None]) -> list[list[float]]:
    """Seconds of each action, taken in turns so that whatever else the machine does falls on all of them."""
    seconds: list[list[float]] = [[] for _ in actions]
    for round_ in range(ROUNDS + 2):
        for action, taken in zip(actions, seconds, strict=True):
            start = time.perf_counter()
            action()
            if round_ >= 2:  # the first ones touch memory for the first time
                taken.append(time.perf_counter() - start)
    return seconds


@pytest.mark.parametrize(
    ("dtype", "master_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
    ids=["float32", "bfloat16, float32 masters", "bfloat16 alone"],
)
def test_full_fine_tuning(dtype: torch.dtype, master_dtype: torch.dtype) -> None:
    policy = model(dtype)
    reference = copy.deepcopy(policy)
    average = ModelAverage(reference, lambda: policy, master_dtype)
    ours, theirs = alternating(
        lambda: average.move_to_policy(0.6), lambda: SyncRefModelCallback._sync_target_model(policy, reference, 0.6)
    )
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    print(
        f"\n{dtype} weights, {master_dtype} average: {1e3 * statistics.median(ours):.1f} ms, TRL's callback "
        f"{1e3 * statistics.median(theirs):.1f} ms; ratio {statistics.median(ratios):.3f} "
        f"(quartiles {statistics.quantiles(ratios, n=4)[0]:.3f} to {statistics.quantiles(ratios, n=4)[2]:.3f})"
    )


@pytest.mark.parametrize("average", ["exact", "factors"])
def test_adapters(average: str) -> None:
    config = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    policy = get_peft_model(model(), config)
    moving = AdapterAverage(lambda: policy, EmaOptions(average=average), torch.float32)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    seconds = []
    for _ in range(5):
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if "default" in name:
                    parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
        start = time.perf_counter()
        moving.move_to_policy(0.6)
        seconds.append(time.perf_counter() - start)
    modules = sum("lora_A.default" in name for name, _ in policy.named_parameters())
    print(f"\nLoRA r=16, {modules} modules, {average}: {1e3 * statistics.median(seconds):.0f} ms a sync")
