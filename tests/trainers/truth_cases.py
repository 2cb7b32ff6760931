"""The cases of `test_truth.py`, kind by kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import peft
from peft import LoraConfig

from .. import tiny
from . import truth_models as models
from .truth import BOTH, BY_TRL, REFUSED, RIGHT, Case
from .truth_models import lora, named, new_adapter, own_adapter, passed, peft_reference


PROVIDERS = ("auto", "frozen", "cached", "ema")
HEAD = [*models.ATTENTION, "lm_head"]
HEADS: dict[str, tuple[LoraConfig, dict[str, Any]]] = {
    "lora-on-head": (lora(target_modules=HEAD), {}),
    "lora-on-tied-head": (lora(target_modules=HEAD), {"tie_word_embeddings": True}),
    "saved-head": (lora(modules_to_save=["lm_head"]), {}),
    "saved-tied-head": (lora(modules_to_save=["lm_head"]), {"tie_word_embeddings": True}),
    "dora-on-head": (lora(target_modules=HEAD, use_dora=True), {}),
    "lora-on-head-alone": (lora(target_modules=["lm_head"]), {}),
    "lora-on-head-and-embedding": (lora(target_modules=[*HEAD, "embed_tokens"]), {}),
    "saved-head-and-embedding": (lora(modules_to_save=["lm_head", "embed_tokens"]), {}),
}


def output_embedding() -> Iterator[Case]:
    """An adapter on the output embedding, whose weights a fused head multiplies itself."""
    any_refusal = (*BOTH, BY_TRL)
    for name, (config, overrides) in HEADS.items():
        for provider in PROVIDERS:
            yield Case(f"policy-with-{name}", own_adapter(config, **overrides), provider, allowed=any_refusal)
        yield Case(f"new-{name}", new_adapter(config, **overrides), allowed=any_refusal)
        yield Case(f"passed-{name}", peft_reference(config, **overrides))
        yield Case(f"passed-{name}", peft_reference(config, **overrides), kind="grpo")
        yield Case(f"passed-to-adapter-{name}", peft_reference(config, "lora", **overrides), kind="grpo")
        yield Case(f"named-{name}", named(config, **overrides), "frozen")
    config = HEADS["lora-on-head"][0]
    yield Case("policy-with-lora-on-head", own_adapter(config), "adapter", {"start": "adapter"}, allowed=any_refusal)
    yield Case("policy-with-lora-on-head", own_adapter(config), "adapter", {"scoring": "packed"}, allowed=any_refusal)
    for kind in ("kto", "grpo"):
        yield Case("policy-with-lora-on-head", own_adapter(config), kind=kind, allowed=any_refusal)
    yield Case("passed-lora-on-head", peft_reference(config), "frozen", {"scoring": "packed"})
    yield Case("passed-lora-on-head", peft_reference(config), "cached")
    yield Case("passed-lokr-on-head", peft_reference(peft.LoKrConfig(r=4, target_modules=HEAD, task_type="CAUSAL_LM")))
    ia3 = peft.IA3Config(target_modules=HEAD, feedforward_modules=[], task_type="CAUSAL_LM")
    yield Case("policy-with-ia3-on-head", own_adapter(ia3), allowed=any_refusal)
    yield Case("passed-ia3-on-head", peft_reference(ia3))


def initializations() -> Iterator[Case]:
    """Adapters whose initialization rewrites the base."""
    configs = {
        "pissa": lora(init_lora_weights="pissa"),
        "pissa-by-power": lora(init_lora_weights="pissa_niter_4"),
        "olora": lora(init_lora_weights="olora"),
        "orthogonal": lora(init_lora_weights="orthogonal"),
    }
    if find_spec("scipy"):
        configs["loftq"] = lora(init_lora_weights="loftq", loftq_config=peft.LoftQConfig(loftq_bits=4))
    for name, config in configs.items():
        for provider in PROVIDERS:
            yield Case(f"policy-with-new-{name}", own_adapter(config, move=False), provider)
        yield Case(f"policy-with-trained-{name}", own_adapter(config))
        yield Case(f"policy-with-named-{name}", own_adapter(config, name="mine"))
        yield Case(f"reloaded-{name}", models.reloaded(config))
    for name in ("pissa", "olora"):
        config = configs[name]
        for kind in ("kto", "grpo"):
            yield Case(f"policy-with-trained-{name}", own_adapter(config), kind=kind)
        for provider in ("cached", "ema"):
            yield Case(f"policy-with-trained-{name}", own_adapter(config), provider)
            yield Case(f"reloaded-{name}", models.reloaded(config), provider)
        for provider in PROVIDERS:
            yield Case(f"new-{name}", new_adapter(config), provider)
        yield Case(f"new-{name}", new_adapter(config), kind="grpo")
        yield Case(f"passed-{name}", peft_reference(config))


def by_transformers() -> Iterator[Case]:
    """Adapters that transformers put on the model, without a `PeftModel`."""
    for how in ("from_pretrained", "load_adapter", "add_adapter"):
        for provider in PROVIDERS:
            yield Case(f"{how}-and-config", models.by_transformers(how, lora()), provider)
            # What transformers saves of it depends on the version of PEFT
            yield Case(f"{how}-alone", models.by_transformers(how), provider, args={"save_strategy": "no"})
        yield Case(f"{how}-and-config", models.by_transformers(how, lora()), kind="kto")
        yield Case(f"{how}-and-config", models.by_transformers(how, lora()), kind="grpo")


def harm_to_the_base() -> Iterator[Case]:
    """Whatever the reference shares with the policy changes while training goes on."""
    new, old = new_adapter(lora()), own_adapter(lora())
    scaled = models.scaled(1.01)
    lazy = {"fill": "lazy"}
    for make, name in ((new, "new"), (old, "own")):
        for provider, options in (("auto", {}), ("cached", lazy), ("ema", {})):
            for when, by in (("constructed", 0), ("begin", 2), ((1,), 2), ((3,), 4), ((4,), 4)):
                # By the third step each row has been asked for once, and is in the store
                allowed = BOTH if options and when in ((3,), (4,)) else (REFUSED,)
                yield Case(f"{name}-scaled", make, provider, options, allowed=allowed, harm=scaled, when=when, by=by)
        yield Case(f"{name}-scaled", make, "cached", harm=scaled, by=4)  # all of it is in the store by then
        for provider in ("frozen", "auto"):
            allowed = (RIGHT,) if provider == "frozen" else (REFUSED,)
            for kind in ("kto", "grpo"):
                yield Case(f"{name}-scaled", make, provider, kind=kind, allowed=allowed, harm=scaled, by=2)
    for harm in (
        models.replaced,
        models.norm_scaled,
        models.embedding_scaled,
        models.frequencies_scaled,
        models.attention_scaled,
        models.hooked,
        models.unfrozen,
        models.stepped,
        models.cast,
        models.resized,
    ):
        when: Any = "constructed" if harm in (models.unfrozen, models.cast) else (1,)
        for provider, options in (("auto", {}), ("cached", lazy), ("ema", {})):
            yield Case(harm.__name__, new, provider, options, harm=harm, when=when, by=2)
        allowed = BOTH if harm is models.cast else (RIGHT,)  # the policy itself is no longer what it was
        yield Case(harm.__name__, new, "frozen", allowed=allowed, harm=harm, when=when)
    gemma = new_adapter(lora(), architecture="gemma2")
    yield Case("capped", gemma, harm=models.capped, by=2)
    yield Case("capped", gemma, "frozen", allowed=(RIGHT,), harm=models.capped)
    for harm in (models.reference_adapter_scaled, models.reference_adapter_written):
        yield Case(harm.__name__, old, allowed=(REFUSED,), harm=harm, by=2)
    yield Case("new-another-adapter", new, allowed=(RIGHT,), harm=models.another_adapter, when="constructed")
    yield Case("own-another-adapter", old, allowed=(RIGHT,), harm=models.another_adapter, when="constructed")
    yield Case("attention-by-another-kernel", new, allowed=(RIGHT,), harm=models.by_another_kernel)
    yield Case("reference_adapter_deleted", old, allowed=(REFUSED,), harm=models.reference_adapter_deleted, by=2)
    for make, name in ((new_adapter(lora(), "bf16"), "new"), (own_adapter(lora(), "bf16"), "own")):
        for provider, options in (("auto", {}), ("cached", lazy), ("ema", {})):
            common: dict[str, Any] = dict(precision="bf16", provider=provider, options=options)
            yield Case(f"{name}-scaled", make, harm=models.scaled(1.05), by=2, allowed=(REFUSED,), **common)
    # Large updates, so that what a merge rounds away of the base is seen
    heavy, each = new_adapter(lora(lora_alpha=2048), "bf16"), (1, 2, 3, 4)
    for provider, options in (("auto", {}), ("cached", lazy), ("ema", {})):
        common = dict(precision="bf16", provider=provider, options=options)
        yield Case("merged-and-unmerged", heavy, harm=models.merged_and_unmerged, when=each, by=4, **common)
    yield Case("merged-and-unmerged", new, harm=models.merged_and_unmerged, when=each, allowed=(RIGHT,))
    whole = models.full()
    for provider in ("auto", "frozen", "cached", "ema"):
        yield Case("whole-scaled", whole, provider, allowed=(RIGHT,), harm=scaled)


def harm_to_the_reference() -> Iterator[Case]:
    """Somebody writes to `trainer.ref_model`."""
    for harm in (
        models.reference_written,
        models.reference_data_written,
        models.reference_weight_written,
        models.reference_module_written,
        models.reference_synchronized,
        models.reference_exchanged,
    ):
        yield Case(harm.__name__, models.full(), harm=harm, by=2)
        yield Case(harm.__name__, models.full(), harm=harm, when=(4,), by=4)
    for strict in (True, False):
        loaded = models.reference_loaded(strict)
        name = f"load_state_dict-{'strict' if strict else 'lenient'}"
        for provider in ("frozen", "cached", "ema"):
            yield Case(name, models.full(), provider, allowed=(REFUSED,), harm=loaded, by=1)
        yield Case(f"adapter-{name}", new_adapter(lora()), allowed=(REFUSED,), harm=loaded, by=1)
    other = passed(lambda: tiny.model(seed=1))
    for when, by in (("constructed", 0), ("begin", 2)):
        yield Case("passed_reference_written", other, harm=models.reference_written, when=when, by=by)
    for kind in ("kto", "grpo"):
        yield Case("reference_written", models.full(), kind=kind, harm=models.reference_written, by=2)


def shared_weights() -> Iterator[Case]:
    """A `ref_model` that has weights in common with the policy."""
    for how in (
        "shallow copy",
        "base of the policy",
        "two adapters on one base",
        "an adapter on the policy",
        "all data",
        "one weight's data",
        "a view of it",
        "one layer",
        "the head",
    ):
        for provider in ("auto", "cached"):
            yield Case(f"sharing {how}".replace(" ", "-"), models.sharing(how), provider)
        yield Case(f"sharing {how}".replace(" ", "-"), models.sharing(how), kind="grpo")
    yield Case("sharing-shallow-copy", models.sharing("shallow copy"), kind="kto")
    yield Case("sharing-shallow-copy", models.sharing("shallow copy"), "ema")


def adapters_of_the_policy() -> Iterator[Case]:
    """The reference is an adapter of the policy's by name, or the base of a policy that comes with one."""
    base = {"start": "base"}
    configs = {
        "plain": lora(),
        "pissa": lora(init_lora_weights="pissa"),
        "saved-head": lora(modules_to_save=["lm_head"]),
        "dora": lora(use_dora=True),
    }
    anchor = {"adapter": "anchor"}
    for name, config in configs.items():
        yield Case(f"base-under-{name}", models.base_of_own(config), "adapter", base)
        yield Case(f"anchor-beside-{name}", models.anchored(config), "adapter", anchor)
        yield Case(f"anchor-{name}", models.anchored(lora(), config), "adapter", anchor)
    yield Case("base-under-plain", models.base_of_own(lora()), "adapter", base, harm=models.scaled(1.01), by=2)
    for change in (models.anchor_written, models.anchor_scaled):
        yield Case(change.__name__, models.anchored(lora()), "adapter", anchor, harm=change, allowed=(REFUSED,), by=2)
    yield Case("anchor-scaled-before", models.anchored(lora(), change=models.anchor_scaled_in), "adapter", anchor)


def peft_references() -> Iterator[Case]:
    """A `ref_model` that is a PEFT model, and an adapter's directory by name."""
    for kind in ("dpo", "kto", "grpo", "rloo"):
        yield Case("passed-adapter", peft_reference(lora()), kind=kind, allowed=(RIGHT,))
        yield Case("passed-adapter", peft_reference(lora()), "frozen", {"scoring": "packed"}, kind, (RIGHT,))
        yield Case("passed-adapter-to-adapter", peft_reference(lora(), "lora"), kind=kind, allowed=(RIGHT,))
        yield Case("named-adapter", named(lora()), "frozen", kind=kind, allowed=(RIGHT,))
        yield Case("named-adapter-to-adapter", named(lora(), "lora"), "frozen", kind=kind, allowed=(RIGHT,))
    for kind in ("dpo", "kto"):
        yield Case("passed-adapter", peft_reference(lora()), "cached", kind=kind, allowed=(RIGHT,))
        yield Case("named-adapter-cached", named(lora(), nested=True), "cached", kind=kind, allowed=(RIGHT,))
    yield Case("named-adapter-cached", named(lora(), nested=True), "cached", {"fill": "lazy"}, allowed=(RIGHT,))
    yield Case("named-adapter", named(lora()), "frozen", {"scoring": "packed"}, allowed=(RIGHT,))
    yield Case("passed-adapter", peft_reference(lora()), "ema")
    yield Case("passed-adapter-of-name", peft_reference(lora(), name="mine"), allowed=(RIGHT,))
    yield Case("passed-dora", peft_reference(lora(use_dora=True)), allowed=(RIGHT,))
    yield Case("passed-merged", peft_reference(lora(), change=lambda model: model.merge_adapter()))
    yield Case("passed-disabled", peft_reference(lora(), change=lambda m: m.base_model.disable_adapter_layers()))
    yield Case("passed-gpt2", peft_reference(lora(target_modules=["c_attn"]), architecture="gpt2"))
    yield Case("named-model", named(), "frozen", allowed=(RIGHT,))
    yield Case("named-model", named(nested=True), "cached", allowed=(RIGHT,))


def tensor_subclasses() -> Iterator[Case]:
    """Weights that have no bytes of their own."""
    for how in ("torchao", "halved"):
        for provider in PROVIDERS:
            yield Case(f"{how}-and-config", models.quantized("lora", how), provider, allowed=(RIGHT,))
        for provider in ("auto", "cached"):
            yield Case(f"{how}-with-adapter", models.quantized("trained lora", how), provider, allowed=(RIGHT,))
            yield Case(f"{how}-passed", models.quantized("none", how), provider, allowed=(RIGHT,))
        yield Case(f"{how}-and-config", models.quantized("lora", how), kind="grpo", allowed=(RIGHT,))


def token_indices() -> Iterator[Case]:
    """A few rows of the embedding are trained, which may be rows of the head, too."""
    config = lora(trainable_token_indices=[1, 2, 40, 41])
    several = lora(trainable_token_indices={"embed_tokens": [1, 2, 40, 41]})
    alone = peft.TrainableTokensConfig(token_indices=[1, 2, 40, 41], target_modules=["embed_tokens"])
    for tied in (True, False):
        name = "tied" if tied else "untied"
        for provider in PROVIDERS:
            yield Case(f"{name}-tokens", own_adapter(config, tie_word_embeddings=tied), provider)
            yield Case(f"new-{name}-tokens", new_adapter(config, tie_word_embeddings=tied), provider)
        yield Case(f"{name}-tokens-by-name", own_adapter(several, tie_word_embeddings=tied))
        yield Case(f"{name}-tokens-alone", own_adapter(alone, tie_word_embeddings=tied), allowed=(*BOTH, BY_TRL))
        yield Case(f"{name}-tokens-passed", peft_reference(config, tie_word_embeddings=tied))
        yield Case(f"{name}-tokens-named", named(config, tie_word_embeddings=tied), "frozen")


def vocabularies() -> Iterator[Case]:
    """Ids that the reference does not have."""
    size = len(tiny.tokenizer())
    small, large = size // 4, size + 64

    def few() -> Any:
        return small_head(small)

    for kind in ("dpo", "kto", "grpo"):
        yield Case("small-passed", passed(lambda: tiny.model(seed=1, vocab_size=small)), kind=kind, allowed=(REFUSED,))
        yield Case("head-too-small", passed(few), kind=kind, allowed=(REFUSED,))
        yield Case("large-passed", passed(lambda: tiny.model(seed=1, vocab_size=large)), kind=kind, allowed=(RIGHT,))
    for provider in ("frozen", "cached"):
        yield Case("small-passed", passed(lambda: tiny.model(seed=1, vocab_size=small)), provider, allowed=(REFUSED,))
        yield Case("head-too-small", passed(few), provider, allowed=(REFUSED,))
    packed = {"scoring": "packed"}
    for reference, name in ((lambda: tiny.model(seed=1, vocab_size=small), "small-passed"), (few, "head-too-small")):
        yield Case(name, passed(reference), "frozen", packed, allowed=(REFUSED,))
    yield Case("small-named", named(vocab_size=small), "frozen", allowed=(REFUSED,))
    yield Case("small-named", named(vocab_size=small, nested=True), "cached", allowed=(REFUSED,))


def small_head(rows: int) -> Any:
    """A model whose head knows fewer tokens than its embedding."""
    import torch

    model = tiny.model(seed=1)
    head = torch.nn.Linear(model.config.hidden_size, rows, bias=False)
    head.weight.data = model.lm_head.weight.data[:rows].clone()
    model.lm_head = head
    return model


def other_methods() -> Iterator[Case]:
    """Whatever else PEFT has, as an adapter that the policy comes with, and as a new one."""
    task: dict[str, Any] = dict(task_type="CAUSAL_LM")
    on: dict[str, Any] = dict(task, target_modules=models.ATTENTION)
    configs: dict[str, Any] = {
        "adalora": peft.AdaLoraConfig(init_r=4, target_r=2, total_step=100, **on),
        "replicated": lora(layer_replication=[[0, 2], [1, 2]]),
        "dora": lora(use_dora=True),
        "rslora": lora(use_rslora=True),
        "patterns": lora(rank_pattern={"q_proj": 6}, alpha_pattern={"v_proj": 3}),
        "lora-bias": lora(lora_bias=True),
        "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **task),
        "vera": peft.VeraConfig(r=8, **{**on, "target_modules": ["q_proj"]}),
        "lokr": peft.LoKrConfig(r=4, **on),
        "loha": peft.LoHaConfig(r=4, **on),
        "oft": peft.OFTConfig(r=0, oft_block_size=4, **on),
        "hra": peft.HRAConfig(r=4, **on),
        "fourier": peft.FourierFTConfig(n_frequency=20, **on),
        "shira": peft.ShiraConfig(r=4, **on),
        "miss": peft.MissConfig(r=4, **on),
        "norms": peft.LNTuningConfig(**task),
        "prefix": peft.PrefixTuningConfig(num_virtual_tokens=4, **task),
        "prompt": peft.PromptTuningConfig(num_virtual_tokens=4, **task),
        "p-tuning": peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16, **task),
        "embedding": lora(target_modules=[*models.ATTENTION, "embed_tokens"]),
        "tied-embedding": lora(target_modules=[*models.ATTENTION, "embed_tokens"]),
        "saved-norm": lora(modules_to_save=["norm"]),
    }
    for name, config in configs.items():
        overrides: dict[str, Any] = {"tie_word_embeddings": True} if name.startswith("tied") else {}
        args = {"gradient_checkpointing": False} if name == "prefix" else {}  # TRL cannot train it otherwise
        for provider in ("auto", "cached", "frozen"):
            yield Case(f"policy-with-{name}", own_adapter(config, **overrides), provider, args=args)
        yield Case(f"new-{name}", new_adapter(config, **overrides), args=args)
        yield Case(f"passed-{name}", peft_reference(config, **overrides))
    for name in ("adalora", "replicated", "dora", "rslora", "patterns", "lokr"):
        yield Case(f"policy-with-{name}", own_adapter(configs[name]), "ema")
    experts = lora(target_modules=models.ATTENTION, target_parameters=["mlp.experts.gate_up_proj"])
    for provider in ("auto", "frozen", "cached"):
        yield Case("policy-with-experts", own_adapter(experts, architecture="mixtral"), provider)


def scaled_adapter(model: Any) -> None:
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 3


def second_adapter(model: Any) -> None:
    model.add_adapter("second", lora(r=2))
    model.set_adapter("second")
    models.trained(model, seed=8)


def both_adapters(model: Any) -> None:
    model.add_adapter("second", lora(r=2))
    model.base_model.set_adapter(["default", "second"])
    models.trained(model, seed=8)


def states() -> Iterator[Case]:
    """A policy in a state that its tensors do not tell."""
    states = {
        "scaled-by-hand": scaled_adapter,
        "merged": lambda model: model.merge_adapter(),
        "disabled": lambda model: model.base_model.disable_adapter_layers(),
        "second-active": second_adapter,
        "both-active": both_adapters,
        "base-scaled": lambda model: model.base_model.model.model.norm.weight.data.mul_(1.3),
    }
    for name, change in states.items():
        for provider in PROVIDERS:
            yield Case(f"own-{name}", own_adapter(lora(), change=change), provider)
    for name, change in CHANGES.items():
        for provider in PROVIDERS:
            yield Case(f"whole-{name}", models.changed(change), provider)
    for name in ("frequencies", "attention"):
        yield Case(f"whole-{name}", models.changed(CHANGES[name]), kind="grpo")
    for tied in ("gpt2", "qwen2"):
        make = models.full(architecture=tied, tie_word_embeddings=True)
        for provider in PROVIDERS:
            yield Case(f"tied-{tied}", make, provider, allowed=(RIGHT,))


def hook_on(model: Any) -> None:
    model.model.layers[0].register_forward_hook(
        lambda module, args, output: output * 1.2 if not isinstance(output, tuple) else (output[0] * 1.2, *output[1:])
    )


def head_hook_on(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda module, args, output: output * 0.5)


def parametrize(model: Any) -> None:
    import torch

    torch.nn.utils.parametrizations.weight_norm(model.model.layers[1].mlp.down_proj)


def parametrize_head(model: Any) -> None:
    import torch

    torch.nn.utils.parametrizations.weight_norm(model.lm_head)


def head_in_two(model: Any) -> None:
    """An output embedding that is more than one matrix."""
    import torch

    class Twice(torch.nn.Linear):
        def forward(self, hidden: Any) -> Any:
            return super().forward(hidden) * 0.5

    head = Twice(model.config.hidden_size, model.config.vocab_size, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head


def attention_of(model: Any) -> None:
    model.model.layers[1].self_attn.scaling *= 1.5


CHANGES = {
    "frequencies": lambda model: model.model.rotary_emb.inv_freq.mul_(0.5),
    "attention": attention_of,
    "hook": hook_on,
    "head-hook": head_hook_on,
    "parametrized": parametrize,
    "parametrized-head": parametrize_head,
    "head-in-two": head_in_two,
}


def _changed(model: Any, change: Callable[[Any], object]) -> Any:
    change(model)
    return model


def _changed_model(change: Callable[[Any], object]) -> Any:
    return _changed(tiny.model(), change)


def ordinary() -> Iterator[Case]:
    """No false alarms: runs in which nothing is wrong."""
    for precision in ("float32", "bf16", "autocast"):
        for make, name in (
            (models.full(precision), "whole"),
            (new_adapter(lora(), precision), "new-adapter"),
            (own_adapter(lora(), precision), "own-adapter"),
        ):
            providers: tuple[str, ...] = PROVIDERS if name == "whole" else (*PROVIDERS, "adapter")
            for provider in providers:
                yield Case(f"ordinary-{name}", make, provider, precision=precision, allowed=(RIGHT,))
            for kind in ("kto", "grpo"):
                yield Case(f"ordinary-{name}", make, kind=kind, precision=precision, allowed=(RIGHT,))
    for provider, options in (("cached", {"fill": "lazy"}), ("adapter", {"scoring": "packed"})):
        for make, name in ((new_adapter(lora()), "new-adapter"), (own_adapter(lora()), "own-adapter")):
            yield Case(f"ordinary-{name}", make, provider, options, allowed=(RIGHT,))
    dropping = {"disable_dropout": False}
    for provider in PROVIDERS:
        make = own_adapter(lora(lora_dropout=0.3), attention_dropout=0.3)
        yield Case("ordinary-with-dropout", make, provider, args=dropping, allowed=(RIGHT,))
        yield Case("ordinary-path", models.path(), provider, allowed=(RIGHT,))
    for make, name in ((models.full(), "whole"), (new_adapter(lora()), "new-adapter"), (own_adapter(lora()), "own")):
        precomputed = {"precompute_ref_log_probs": True}
        yield Case(f"ordinary-precomputed-{name}", make, args=precomputed, allowed=(RIGHT,))
        yield Case(f"ordinary-cool-{name}", models.at_temperature(make, 0.7), kind="grpo", allowed=(RIGHT,))
    yield Case("precomputed-pissa", own_adapter(lora(init_lora_weights="pissa")), args=precomputed)
    yield Case("cool-passed-adapter", models.at_temperature(peft_reference(lora()), 0.7), kind="grpo")
    yield Case("ordinary-passed", passed(lambda: tiny.model(seed=1)), allowed=(RIGHT,))
    yield Case("ordinary-passed-to-adapter", passed(lambda: tiny.model(seed=1), "lora"), allowed=(RIGHT,))
    yield Case("ordinary-passed", passed(lambda: tiny.model(seed=1)), kind="grpo", allowed=(RIGHT,))
    yield Case("ordinary-passed", passed(lambda: tiny.model(seed=1)), "cached", allowed=(RIGHT,))


# Models that a `Scorer` is given by itself: all of these have to be scored as their own logits say, or refused.
SCORED: dict[str, Callable[[], Any]] = {
    "plain-adapter": lambda: models.adapted(lora()),
    "dora": lambda: models.adapted(lora(use_dora=True)),
    "prompt": lambda: models.adapted(peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")),
    "prefix": lambda: models.adapted(peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")),
    "tied-tokens": lambda: models.adapted(lora(trainable_token_indices=[1, 2, 40]), tie_word_embeddings=True),
    "merged-lora-on-head": lambda: _changed(models.adapted(lora(target_modules=HEAD)), lambda m: m.merge_adapter()),
    "disabled-lora-on-head": lambda: _changed(
        models.adapted(lora(target_modules=HEAD)), lambda m: m.base_model.disable_adapter_layers()
    ),
    "head-too-small": lambda: small_head(len(tiny.tokenizer()) // 4),
    "vocabulary-too-small": lambda: tiny.model(vocab_size=len(tiny.tokenizer()) // 4),
    "gemma2": lambda: tiny.model("gemma2"),
    **{name: partial(models.adapted, config, **overrides) for name, (config, overrides) in HEADS.items()},
    **{name: partial(_changed_model, change) for name, change in CHANGES.items()},
}


def _unique(cases: list[Case]) -> list[Case]:
    seen: dict[str, Case] = {}
    for case in cases:
        assert case.allowed in (BOTH, (RIGHT,), (REFUSED,), (*BOTH, BY_TRL))
        assert case.id not in seen, case.id
        seen[case.id] = case
    return list(seen.values())


_QUICK_METHODS = ("adalora", "replicated", "dora", "ia3", "lokr", "norms", "prefix", "prompt", "tied-embedding")


def _is_quick(kind: str, case: Case, cases: list[Case]) -> bool:
    """Whether a case is of the default selection: of those of one name, which differ in provider or trainer, a few."""
    if kind == "other_methods" and case.name.removeprefix("policy-with-") not in _QUICK_METHODS:
        return case.name in ("new-replicated", "passed-prompt", "passed-ia3")
    if kind == "output_embedding" and case.name not in ("policy-with-lora-on-head", "policy-with-saved-head"):
        return case.name in ("passed-lora-on-head", "passed-saved-head", "passed-to-adapter-lora-on-head")
    rank = [other for other in cases if other.name == case.name].index(case)
    return rank < (2 if case.name in ("new-scaled", "own-scaled") else 1)


KINDS = (
    output_embedding,
    initializations,
    by_transformers,
    harm_to_the_base,
    harm_to_the_reference,
    shared_weights,
    adapters_of_the_policy,
    peft_references,
    tensor_subclasses,
    token_indices,
    vocabularies,
    other_methods,
    states,
    ordinary,
)
ALL = {kind.__name__: _unique(list(kind())) for kind in KINDS}
CASES = [case for kind, cases in ALL.items() for case in cases if _is_quick(kind, case, cases)]
SLOW = [case for cases in ALL.values() for case in cases if case not in CASES]
