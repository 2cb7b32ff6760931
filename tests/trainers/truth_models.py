"""Policies and references of every awkward kind, and what can be done to them while training is on its way."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from .. import tiny
from .oracle import Truth
from .truth import Setting


Make = Callable[[Path], Setting]
ATTENTION = ["q_proj", "v_proj"]
_ADAPTER = ("lora_", "modules_to_save", "trainable_tokens", "prompt", "ia3_", "vera_lambda", "lokr_", "hada_")


def lora(**options: Any) -> LoraConfig:
    """LoRA on the attention, unless told otherwise."""
    return LoraConfig(**{"r": 4, "target_modules": ATTENTION, "task_type": "CAUSAL_LM", **options})


def trained(model: Any, seed: int = 3, size: float = 0.15) -> Any:
    """`model` with every trainable weight moved, as training would have."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                parameter.add_(size * noise)
    return model


def adapted(config: Any, architecture: str = "llama", name: str = "default", move: bool = True, **k: Any) -> Any:
    """A `PeftModel` with an adapter that has been trained."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = get_peft_model(tiny.model(architecture, **k), copy.deepcopy(config), adapter_name=name)
    return trained(model) if move else model


def in_precision(model: Any, precision: str) -> Any:
    return model.to(torch.bfloat16) if precision == "bf16" else model


# Policies


def full(precision: str = "float32", architecture: str = "llama", **overrides: Any) -> Make:
    """A model that is trained whole: its reference is itself."""

    def make(directory: Path) -> Setting:
        policy = in_precision(tiny.model(architecture, **overrides), precision)
        return Setting(policy, Truth(policy, autocast=precision == "autocast"))

    return make


def new_adapter(config: Any, precision: str = "float32", architecture: str = "llama", **overrides: Any) -> Make:
    """A model with a `peft_config`: the reference is the model as it is passed in."""

    def make(directory: Path) -> Setting:
        policy = in_precision(tiny.model(architecture, **overrides), precision)
        return Setting(policy, Truth(policy, autocast=precision == "autocast"), peft_config=copy.deepcopy(config))

    return make


Change = Callable[[Any], object]


def own_adapter(config: Any, precision: str = "float32", change: Change | None = None, **k: Any) -> Make:
    """A policy that comes with an adapter: the reference is the two of them, as they start."""

    def make(directory: Path) -> Setting:
        policy = in_precision(adapted(config, **k), precision)
        if change is not None:
            change(policy)
        return Setting(policy, Truth(policy, autocast=precision == "autocast"))

    return make


def reloaded(config: Any, **k: Any) -> Make:
    """The same, saved and loaded again, on the base it was made of."""

    def make(directory: Path) -> Setting:
        base = tiny.model()
        base.save_pretrained(directory / "base")
        with torch.random.fork_rng():
            torch.manual_seed(5)
            model = get_peft_model(AutoModelForCausalLM.from_pretrained(directory / "base"), copy.deepcopy(config))
        trained(model).save_pretrained(directory / "adapter")
        base = AutoModelForCausalLM.from_pretrained(directory / "base")
        policy = PeftModel.from_pretrained(base, directory / "adapter", is_trainable=True)
        return Setting(policy, Truth(policy))

    return make


def changed(change: Callable[[Any], object], **k: Any) -> Make:
    """A model that was changed in memory before it was passed in."""

    def make(directory: Path) -> Setting:
        policy = tiny.model(**k)
        change(policy)
        return Setting(policy, Truth(policy))

    return make


def saved_adapter(directory: Path, config: Any, **overrides: Any) -> str:
    """A trained adapter's directory, that names its base's."""
    base = tiny.saved(directory / "base", **overrides)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), copy.deepcopy(config))
    trained(model).save_pretrained(directory / "adapter")
    return str(directory / "adapter")


def by_transformers(how: str, peft_config: Any = None) -> Make:
    """A trained adapter that transformers itself put on the model."""

    def make(directory: Path) -> Setting:
        path = saved_adapter(directory, lora())
        if how == "from_pretrained":
            policy = AutoModelForCausalLM.from_pretrained(path)
        elif how == "load_adapter":
            policy = AutoModelForCausalLM.from_pretrained(tiny.saved(directory / "base"))
            policy.load_adapter(path)
        else:
            policy = AutoModelForCausalLM.from_pretrained(tiny.saved(directory / "base"))
            try:
                policy.add_adapter(lora())
            except ValueError as error:  # transformers wants a newer PEFT for this than it is installed with
                pytest.skip(str(error))
            trained(policy)
        return Setting(policy, Truth(policy), peft_config=copy.deepcopy(peft_config))

    return make


def path() -> Make:
    """A policy that TRL loads."""

    def make(directory: Path) -> Setting:
        saved = tiny.saved(directory / "policy")
        return Setting(saved, Truth(AutoModelForCausalLM.from_pretrained(saved)))

    return make


def at_temperature(make: Make, temperature: float) -> Make:
    """The same, sampled at another temperature."""

    def warmed(directory: Path) -> Setting:
        setting = make(directory)
        setting.truth.temperature = temperature
        return setting

    return warmed


def base_of_own(config: Any, **k: Any) -> Make:
    """A policy that comes with an adapter; the reference is declared to be its base."""

    def make(directory: Path) -> Setting:
        policy = adapted(config, **k)
        return Setting(policy, Truth(policy, disabled=True))

    return make


def anchored(config: Any, anchor: Any = None, change: Change | None = None) -> Make:
    """A policy with a second adapter, `anchor`, that is declared to be the reference."""

    def make(directory: Path) -> Setting:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            policy = get_peft_model(tiny.model(), copy.deepcopy(anchor or lora()), adapter_name="anchor")
            trained(policy, seed=4)
            policy.add_adapter("default", copy.deepcopy(config))
        policy.set_adapter("default")
        trained(policy)
        if change is not None:
            change(policy)
        return Setting(policy, Truth(policy, adapter="anchor"))

    return make


# References passed or named


def peft_reference(config: Any, policy: str = "full", change: Change | None = None, **k: Any) -> Make:
    """A `ref_model` that is a `PeftModel`."""

    def make(directory: Path) -> Setting:
        reference = adapted(config, seed=1, **k)
        if change is not None:
            change(reference)
        return Setting(
            tiny.model(seed=2), Truth(reference), ref_model=reference, peft_config=lora() if policy == "lora" else None
        )

    return make


def passed(reference: Callable[[], Any], policy: str = "full", **overrides: Any) -> Make:
    """Any other `ref_model`."""

    def make(directory: Path) -> Setting:
        model = reference()
        return Setting(
            tiny.model(seed=2, **overrides),
            Truth(model),
            ref_model=model,
            peft_config=lora() if policy == "lora" else None,
        )

    return make


def named(config: Any = None, policy: str = "full", nested: bool = False, **overrides: Any) -> Make:
    """A reference named by its directory: a model's, or an adapter's if there is a `config`."""

    def make(directory: Path) -> Setting:
        if config is None:
            path = tiny.saved(directory / "other", seed=1, **overrides)
            truth = Truth(AutoModelForCausalLM.from_pretrained(path))
        else:
            path = saved_adapter(directory, config, seed=1, **overrides)
            base = AutoModelForCausalLM.from_pretrained(tiny.saved(directory / "base"))
            truth = Truth(PeftModel.from_pretrained(base, path))
        options = {"source": "frozen", "source_kwargs": {"model": path}} if nested else {"model": path}
        peft_config = lora() if policy == "lora" else None
        return Setting(tiny.model(seed=2), truth, peft_config=peft_config, options=options)

    return make


def sharing(how: str) -> Make:
    """A `ref_model` that has weights in common with the policy."""

    def make(directory: Path) -> Setting:
        policy: Any = tiny.model()
        reference: Any = tiny.model(seed=1)
        if how == "shallow copy":
            reference = copy.copy(policy)
        elif how == "base of the policy":
            policy = adapted(lora())
            reference = policy.get_base_model()
        elif how == "two adapters on one base":
            base = tiny.model()
            policy = trained(get_peft_model(base, lora(), adapter_name="mine"))
            reference = get_peft_model(base, lora(), adapter_name="other")
        elif how == "an adapter on the policy":
            reference = adapted_on(policy)
        elif how == "all data":
            reference = copy.deepcopy(policy)
            for ours, theirs in zip(reference.parameters(), policy.parameters(), strict=True):
                ours.data = theirs.data
        elif how == "one weight's data":
            reference.model.layers[1].mlp.down_proj.weight.data = policy.model.layers[1].mlp.down_proj.weight.data
        elif how == "a view of it":
            whole = torch.randn(2, *policy.model.layers[0].mlp.down_proj.weight.shape) * 0.2
            policy.model.layers[1].mlp.down_proj.weight.data = whole.view(-1, whole.shape[-1])[: whole.shape[1]]
            reference.model.layers[1].mlp.down_proj.weight.data = whole[0]
        elif how == "one layer":
            reference.model.layers[0] = policy.model.layers[0]
        elif how == "the head":
            reference.lm_head = policy.lm_head
        else:
            raise AssertionError(how)
        return Setting(policy, Truth(reference), ref_model=reference)

    return make


def adapted_on(model: Any) -> Any:
    """A trained adapter on `model` itself."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    wrapped = trained(get_peft_model(model, lora()))
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    return wrapped


def quantized(policy: str = "lora", how: str = "torchao") -> Make:
    """Weights that are tensor subclasses: the policy's, under an adapter, or those of a `ref_model`."""

    def make(directory: Path) -> Setting:
        model = tiny.model()
        subclassed(model, how)
        if policy == "lora":
            return Setting(model, Truth(model), peft_config=lora())
        if policy == "trained lora":
            model = trained(get_peft_model(model, lora()))
            return Setting(model, Truth(model))
        return Setting(tiny.model(seed=2), Truth(model), ref_model=model)

    return make


def subclassed(model: Any, how: str) -> None:
    """The weights of the layers' projections become tensor subclasses, in place."""
    if how == "torchao":
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(model.model, quantization.Int8WeightOnlyConfig())
        return
    for layer in model.model.layers:
        for part in (layer.mlp.gate_proj, layer.mlp.down_proj):
            part.weight = nn.Parameter(Halved(part.weight.detach()), requires_grad=False)


class Halved(Tensor):
    """A matrix kept as two: what a quantized tensor does, with inner tensors and no storage of its own."""

    inner: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, whole: Tensor, inner: Tensor | None = None, scale: Tensor | None = None) -> Halved:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls, whole.shape, dtype=whole.dtype, device=whole.device, requires_grad=False
        )

    def __init__(self, whole: Tensor, inner: Tensor | None = None, scale: Tensor | None = None) -> None:
        self.scale = whole.abs().amax(1, keepdim=True) / 127 if scale is None else scale
        self.inner = (whole / self.scale).round().to(torch.int8) if inner is None else inner

    def whole(self) -> Tensor:
        return self.inner.to(self.dtype) * self.scale

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        return ["inner", "scale"], {}

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], meta: Any, size: Any, stride: Any) -> Halved:
        return cls(inner["inner"] * inner["scale"], inner["inner"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in ("detach", "clone", "alias", "_to_copy") and not (kwargs or {}).get("dtype"):
            copied = (lambda t: t.clone()) if name == "clone" else (lambda t: t)
            return cls(args[0], copied(args[0].inner), copied(args[0].scale))
        if name not in ("mm", "addmm", "t", "linear"):
            raise NotImplementedError(f"{function} for {cls.__name__}")
        plain = [arg.whole() if isinstance(arg, cls) else arg for arg in args]
        return function(*plain, **(kwargs or {}))

    def __deepcopy__(self, memo: Any) -> Halved:
        return type(self)(self, self.inner.clone(), self.scale.clone())


# Harm


def base_of(trainer: Any) -> Any:
    """The transformers model that is trained."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def weight_of(part: Any) -> Tensor:
    return getattr(part, "base_layer", part).weight  # type: ignore[no-any-return]


def scaled(factor: float, name: str = "mlp.down_proj", layer: int = 1) -> Callable[[Any], None]:
    """One matrix of the base scaled, in place."""

    def harm(trainer: Any) -> None:
        part = base_of(trainer).model.layers[layer].get_submodule(name)
        with torch.no_grad():
            weight_of(part).mul_(factor)

    return harm


def replaced(trainer: Any) -> None:
    """A matrix of the base exchanged for another one."""
    part = base_of(trainer).model.layers[1].mlp.down_proj
    getattr(part, "base_layer", part).weight = nn.Parameter(weight_of(part).detach() * 1.05, requires_grad=False)


def norm_scaled(trainer: Any) -> None:
    with torch.no_grad():
        base_of(trainer).model.norm.weight.mul_(1.01)


def embedding_scaled(trainer: Any) -> None:
    with torch.no_grad():
        base_of(trainer).get_input_embeddings().weight.mul_(1.01)


def frequencies_scaled(trainer: Any) -> None:
    """A buffer that no state dict has."""
    base_of(trainer).model.rotary_emb.inv_freq.mul_(0.9)


def attention_scaled(trainer: Any) -> None:
    """No tensor at all: a number that a layer keeps."""
    base_of(trainer).model.layers[1].self_attn.scaling *= 1.2


def capped(trainer: Any) -> None:
    """A number of the configuration that is read in every forward pass."""
    base_of(trainer).config.final_logit_softcapping = 3.0


def hooked(trainer: Any) -> None:
    """A forward hook on a layer of the base."""
    base_of(trainer).model.layers[0].register_forward_hook(
        lambda module, args, output: output * 1.05 if isinstance(output, Tensor) else (output[0] * 1.05, *output[1:])
    )


def unfrozen(trainer: Any) -> None:
    """Base weights are trained, too."""
    for name, parameter in trainer.model.named_parameters():
        if "mlp" in name:
            parameter.requires_grad_(True)


def stepped(trainer: Any) -> None:
    """As an optimizer of the user's own does: every weight of the base moves a little."""
    generator = torch.Generator().manual_seed(trainer.state.global_step)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if not any(part in name for part in _ADAPTER):
                parameter.add_(1e-2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def merged_and_unmerged(trainer: Any) -> None:
    """What a sync to a server of completions does with every step."""
    trainer.model.merge_adapter()
    trainer.model.unmerge_adapter()


def cast(trainer: Any) -> None:
    """The base in half the precision."""
    base_of(trainer).model.layers.to(torch.bfloat16).to(torch.float32)


def resized(trainer: Any) -> None:
    """A larger vocabulary, as for new special tokens."""
    base = base_of(trainer)
    base.resize_token_embeddings(base.config.vocab_size + 40)


def by_another_kernel(trainer: Any) -> None:
    """What changes nothing: another implementation of the same attention."""
    base_of(trainer).set_attn_implementation("eager")


def another_adapter(trainer: Any) -> None:
    """One more adapter, that is not used."""
    flags = [(parameter, parameter.requires_grad) for parameter in trainer.model.parameters()]
    trainer.model.add_adapter("extra", lora())
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


def reference_adapter_scaled(trainer: Any) -> None:
    """Only the number by which the frozen copy of the adapter is multiplied."""
    for module in trainer.model.modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict) and "ref" in scaling:
            scaling["ref"] *= 1.5


def reference_adapter_deleted(trainer: Any) -> None:
    trainer.model.delete_adapter("ref")


def reference_adapter_written(trainer: Any) -> None:
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if ".ref." in name:
                parameter.mul_(1.5)


def anchor_written(trainer: Any) -> None:
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if ".anchor." in name:
                parameter.mul_(1.5)


def anchor_scaled(trainer: Any) -> None:
    anchor_scaled_in(trainer.model)


def anchor_scaled_in(model: Any) -> None:
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["anchor"] *= 1.5


def reference_loaded(strict: bool) -> Callable[[Any], None]:
    """The policy's weights loaded into what stands for the reference."""

    def harm(trainer: Any) -> None:
        trainer.ref_model.load_state_dict(trainer.model.state_dict(), strict=strict)

    return harm


def reference_written(trainer: Any) -> None:
    """Its parameters changed in place."""
    with torch.no_grad():
        for parameter in trainer.ref_model.parameters():
            parameter.mul_(1.05)


def reference_data_written(trainer: Any) -> None:
    for parameter in trainer.ref_model.parameters():
        parameter.data.mul_(1.05)


def reference_weight_written(trainer: Any) -> None:
    """One of them, asked for by name."""
    with torch.no_grad():
        trainer.ref_model.get_parameter("model.layers.1.mlp.down_proj.weight").mul_(1.05)


def reference_module_written(trainer: Any) -> None:
    """The copy itself, wherever it is."""
    with torch.no_grad():
        trainer.ref_model.provider.module.model.layers[1].mlp.down_proj.weight.mul_(1.01)


def reference_synchronized(trainer: Any) -> None:
    """TRL's own callback for a reference that follows, used by hand."""
    from trl.trainer.callbacks import SyncRefModelCallback

    SyncRefModelCallback.sync_target_model(trainer.model, trainer.ref_model, 0.6)


def reference_exchanged(trainer: Any) -> None:
    """`trainer.ref_model` is another model from now on."""
    from trl.trainer.utils import add_fused_lm_head

    other = tiny.model(seed=9).eval()
    add_fused_lm_head(other)
    trainer.ref_model = other
