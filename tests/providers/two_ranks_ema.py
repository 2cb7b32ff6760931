"""test_ema_sharded.py runs this on two ranks: `fully_shard`ed models are moved, and every collective is counted."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from tests import tiny
from trl_refplug.models import sharding
from trl_refplug.providers.ema.provider import EmaOptions, EmaProvider


IDS = torch.arange(3, 23)[None]


class Collectives(TorchDispatchMode):
    """Collects the number of elements of everything that is sent between ranks."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional", "c10d_functional"):
            tensors = torch.utils._pytree.tree_leaves(args)
            self.sizes += [t.numel() for t in tensors if isinstance(t, torch.Tensor)]
        return func(*args, **(kwargs or {}))


def sharded(model):
    for layer in model.get_submodule(next(n for n, _ in model.named_modules() if n.endswith("layers"))):
        fully_shard(layer)
    fully_shard(model)
    return model


def provider_of(policy, config=None, place=None, options=None):
    """Make a provider as a trainer does: pin it, place its reference (and shard the policy), and set it up."""
    provider = EmaProvider(options or EmaOptions(alpha=0.3, sync_steps=1))
    context = SimpleNamespace(
        policy=policy,
        peft_config=config,
        temperature=1.0,
        args=SimpleNamespace(should_save=dist.get_rank() == 0),
        accelerator=Accelerator(cpu=True),
        reference_model=None,
    )
    context.reference_model = provider.pin(context)
    if place is not None:
        sharded(policy)
        context.reference_model = place(context.reference_model)
    provider.setup(context)
    return provider


def step(policy, seed):
    """Make the same step with every copy of the policy, through the optimizer, forward and backward of FSDP."""
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.5)
    torch.manual_seed(seed)
    policy(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def full(model):
    model.eval()
    with torch.no_grad():
        return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).clone() for n, p in model.named_parameters()}


def worst(ours, theirs):
    return max(float((ours[n] - w).norm() / w.norm().clamp(min=1e-12)) for n, w in theirs.items())


def full_fine_tuning(out):
    whole_policy = tiny.model("llama", tie_word_embeddings=True)
    policy = copy.deepcopy(whole_policy)
    whole = provider_of(whole_policy)
    provider = provider_of(policy, place=fully_shard)  # TRL shards a reference at its root alone
    whole_reference, reference = whole.module, provider.module
    counted, elements = [], []
    for number in (1, 2, 3):
        step(whole_policy, number)
        step(policy, number)
        with torch.no_grad():
            reference(input_ids=IDS)  # leaves the root gathered
        whole.on_step_end(number)
        with Collectives() as collectives:
            provider.on_step_end(number)
        counted += collectives.sizes
    with Collectives() as control:
        distance = provider.counters()["distance"]
        elements = list(control.sizes)
        full(policy)
    ours, theirs = full(reference), full(whole_reference)
    (out / "full").mkdir(exist_ok=True)
    provider.save_state(out / "full")
    kept = {n: w.clone() for n, w in ours.items()}
    provider.on_step_end(4)
    moved = worst(full(reference), kept)
    provider.load_state(out / "full")
    if dist.get_rank() == 0:
        torch.save(theirs, out / "full.pt")
    return {
        "collectives": counted,
        "control": max(control.sizes),
        "of_distance": elements,
        "error": worst(ours, theirs),
        "distances": [distance, whole.counters()["distance"]],
        "moved": moved,
        "restored": worst(full(reference), kept),
    }


def bias_corrected(out):
    """The models are bfloat16 and the average float32, so that nothing that is saved equals the reference."""
    options = EmaOptions(average="bema", update_freq=1, ref_model_update_freq=2)
    whole_policy = tiny.model("llama", tie_word_embeddings=True).bfloat16()
    policy = copy.deepcopy(whole_policy)
    whole = provider_of(whole_policy, options=options)
    provider = provider_of(policy, place=fully_shard, options=options)
    sizes = []
    for each in (whole, provider):
        each.on_train_begin()
    for number in (1, 2, 3):
        copy_step(policy, whole_policy, number)
        whole.on_step_end(number)
        with Collectives() as collectives:
            provider.on_step_end(number)
        sizes += collectives.sizes
    (out / "bias_corrected").mkdir(exist_ok=True)
    provider.save_state(out / "bias_corrected")
    copy_step(policy, whole_policy, 4)
    whole.on_step_end(4)
    expected = full(whole.module)
    start = full(provider.module)
    # As in a run that goes on from a checkpoint: another provider loads the state, and then training begins.
    resumed = provider_of(copy.deepcopy(whole_policy), place=fully_shard, options=options)
    resumed._context.policy = policy
    resumed.load_state(out / "bias_corrected")
    resumed.on_train_begin()
    for each in (provider, resumed):
        each.on_step_end(4)
    return {
        "collectives": sizes,
        "moved": worst(full(provider.module), start),
        "error": worst(full(provider.module), expected),
        "resumed": worst(full(resumed.module), expected),
    }


@torch.no_grad()
def copy_step(policy, whole_policy, seed):
    """Make the same step with the sharded policy and with the whole one, to the bit."""
    generator = torch.Generator().manual_seed(seed)
    theirs = dict(policy.named_parameters())
    for name, parameter in whole_policy.named_parameters():
        parameter.add_((torch.randn(parameter.shape, generator=generator) * 0.02).to(parameter.dtype))
        sharding.write_part(theirs[name], parameter)


def adapter(out):
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", modules_to_save=["norm"])

    def policy_of():
        torch.manual_seed(0)
        return get_peft_model(tiny.model("llama"), copy.deepcopy(config))

    whole_policy, policy = policy_of(), policy_of()
    whole, provider = provider_of(whole_policy, config), provider_of(policy, config)
    sharded(policy)
    assert type(next(policy.parameters())).__name__ == "DTensor"
    counted = []
    for number in (1, 2, 3):
        step(whole_policy, number)
        step(policy, number)
        whole.on_step_end(number)
        with Collectives() as collectives:
            provider.on_step_end(number)
        counted += collectives.sizes
    distances = [provider.counters()["distance"], whole.counters()["distance"]]
    ours = {n: w for n, w in full(policy).items() if ".ref." in n}
    theirs = {n: w for n, w in full(whole_policy).items() if ".ref." in n}
    products = {n: ours[n] @ ours[n.replace("lora_B", "lora_A")] for n in ours if "lora_B" in n}
    expected = {n: theirs[n] @ theirs[n.replace("lora_B", "lora_A")] for n in theirs if "lora_B" in n}
    saved = [worst({n: ours[n]}, {n: theirs[n]}) for n in ours if "modules_to_save" in n]
    (out / "adapter").mkdir(exist_ok=True)
    provider.save_state(out / "adapter")
    provider.on_step_end(4)
    provider.load_state(out / "adapter")
    again = {n: w for n, w in full(policy).items() if ".ref." in n}
    largest = max(p.numel() for n, p in whole_policy.named_parameters() if ".default." in n)
    return {
        "collectives": counted,
        "largest_factor": largest,
        "error": max(worst(products, expected), *saved),
        "moved": max(float(w.norm()) for w in expected.values()),
        "distances": distances,
        "restored": worst(again, ours),
    }


def run_all(out: Path) -> dict[str, Any]:
    dist.init_process_group("gloo")
    results = {"full": full_fine_tuning(out), "bias_corrected": bias_corrected(out), "adapter": adapter(out)}
    dist.barrier()
    return results
