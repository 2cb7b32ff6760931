"""
Digests of models: they tell which distribution a model computes, whatever it is wrapped in and wherever it is.

A digest covers the configuration and every tensor's canonical name, shape, dtype and bytes, so that two models with
the same digest give the same log-probs. Wrappers (PEFT, DDP, `torch.compile`) do not change it. Sharded tensors are
gathered one at a time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
import xxhash

from trl_refplug.errors import ConfigurationError
from trl_refplug.models.sharding import gathered, reshard
from trl_refplug.models.weights import plain_parts


if TYPE_CHECKING:
    from torch import Tensor, nn


# Entries of the configuration that cannot change a log-prob (names, versions), or that the digest or the caller covers
# in another way (the dtype, the attention implementation)
_IRRELEVANT_CONFIG = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "dtype",
        "torch_dtype",
        "pad_token_id",
        "transformers_version",
        "use_cache",
    }
)
_IRRELEVANT_ADAPTER_CONFIG = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "init_lora_weights",
        "lora_dropout",
        "peft_version",
        "revision",
        "runtime_config",
        "task_type",
    }
)
_WRAPPER_COMPONENTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def digest_model(model: nn.Module, adapter: str | None = None) -> str:
    """
    The digest of the distribution that `model` computes. Where its tensors are sharded, all ranks have to call this
    together.

    Args:
        model (`nn.Module`): A transformers model, possibly wrapped.
        adapter (`str`, *optional*): For a PEFT model, the name of the adapter that is part of the distribution. By
            default none is, and the digest is that of the base model, as if PEFT had never wrapped it.

    Returns:
        `str`: 32 hex digits (xxh3-128).
    """
    return combine_digests(model, digest_tensors(model, adapter), adapter)


def digest_tensors(
    model: nn.Module, adapter: str | None = None, dtypes: Mapping[str, torch.dtype] | None = None
) -> dict[str, str]:
    """
    The digest of every tensor that [`digest_model`] covers, by canonical name. They tell *which* weights differ.

    Args:
        model (`nn.Module`), adapter (`str`, *optional*): As for [`digest_model`].
        dtypes (`Mapping[str, torch.dtype]`, *optional*): By canonical name, the dtype that a tensor is cast to before
            it is digested. FSDP casts the weights that it trains to float32, and this casts them back.
    """
    if not _weights_on_first_rank_only() or any(hasattr(tensor, "full_tensor") for tensor in model.parameters()):
        return _digest_tensors_here(model, adapter, dtypes or {})
    digests = [_digest_tensors_here(model, adapter, dtypes or {}) if torch.distributed.get_rank() == 0 else {}]
    torch.distributed.broadcast_object_list(digests, src=0)
    return digests[0]


def tensor_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """The dtype of every tensor that [`digest_model`] covers, by canonical name."""
    return {name: tensor.dtype for name, tensor in canonical_tensors(model, None)}


def _digest_tensors_here(model: nn.Module, adapter: str | None, dtypes: Mapping[str, torch.dtype]) -> dict[str, str]:
    tensors = dict(sorted(canonical_tensors(model, adapter), key=itemgetter(0)))
    meta = [name for name, tensor in tensors.items() if tensor.is_meta]
    if meta:
        raise ConfigurationError(
            f"Cannot digest a model whose weights are not loaded: {meta[0]!r} is on the meta device. Load all of it: "
            "without `init_empty_weights()`, and with a `device_map` that offloads nothing."
        )
    workers = min(8, os.cpu_count() or 1)
    pending: list[Future[str]] = []
    with ThreadPoolExecutor(max_workers=workers) as pool:
        # All ranks gather the same tensor at the same time, so one thread has to fetch them in order. Only the hashing
        # is done by several threads.
        for name, tensor in tensors.items():
            if len(pending) >= 2 * workers:  # bounds how much of an accelerator's memory is copied to the host at once
                pending[-2 * workers].result()
            with gathered([tensor]) as (whole,):
                on_host = whole.to("cpu", dtypes.get(name, whole.dtype))
                if hasattr(tensor, "ds_id"):  # ZeRO-3 frees what it gathered before a thread has hashed it
                    on_host = on_host.clone()
            pending.append(pool.submit(_digest_tensor, on_host))
        return {name: future.result() for name, future in zip(tensors, pending, strict=True)}


def _weights_on_first_rank_only() -> bool:
    """Whether transformers loads the weights on the first rank only, from where FSDP will send them to the others."""
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and all(
            os.environ.get(name, "").lower() in ("1", "true", "yes")
            for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
        )
    )


def combine_digests(model: nn.Module, tensors: Mapping[str, str], adapter: str | None = None) -> str:
    """The same as [`digest_model`], from the digests that [`digest_tensors`] has already computed."""
    digest = xxhash.xxh3_128(json.dumps(tensors, sort_keys=True).encode())
    digest.update(_canonical_json(getattr(model, "config", None), _IRRELEVANT_CONFIG))
    if adapter is not None:
        digest.update(_canonical_json(model.peft_config[adapter], _IRRELEVANT_ADAPTER_CONFIG))  # type: ignore[index]
    return digest.hexdigest()


def adapter_tensor_name(name: str, adapter_attributes: frozenset[str]) -> tuple[str, str] | None:
    """
    Split the name of an adapter's parameter into the adapter's name and the parameter's canonical name.

    For example, `q_proj.lora_A.default.weight` gives `("default", "q_proj.lora_A.weight")`, and
    `lm_head.modules_to_save.default.weight` gives `("default", "lm_head.modules_to_save.weight")`.

    Args:
        name (`str`): Name of a parameter of a PEFT model.
        adapter_attributes (`frozenset[str]`): What the function of that name returns for the model.

    Returns:
        `tuple[str, str]` or `None`: `None` if the parameter does not belong to an adapter.
    """
    components = name.split(".")
    for position, component in enumerate(components[:-1]):
        if component in adapter_attributes:
            return components[position + 1], ".".join(components[: position + 1] + components[position + 2 :])
    return None


def adapter_attributes(model: nn.Module) -> frozenset[str]:
    """The names of the submodules in which PEFT keeps one entry per adapter (`lora_A`, `modules_to_save`, ...)."""
    attributes = {"modules_to_save", "prompt_encoder", "trainable_tokens_delta", "trainable_tokens_original"}
    for module in model.modules():
        for kind in ("adapter_layer_names", "other_param_names"):
            attributes.update(getattr(module, kind, ()))
    return frozenset(attributes)


def canonical_tensors(model: nn.Module, adapter: str | None) -> Iterator[tuple[str, Tensor]]:
    """
    The parameters and buffers that decide what `model` computes, tied ones once, each with its canonical name: the
    name that it has in the model without any wrapper.

    Args:
        model (`nn.Module`): A transformers model, possibly wrapped.
        adapter (`str` or `None`): For a PEFT model, the adapter whose tensors are included.
    """
    is_peft = hasattr(model, "peft_config") and hasattr(model, "get_base_model")
    attributes = adapter_attributes(model) if is_peft else frozenset()
    prefix = _peft_prefix(model) if is_peft else ""
    seen: set[int] = set()
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if not isinstance(tensor, torch.Tensor) or id(tensor) in seen:  # tied weights count once
            continue
        seen.add(id(tensor))
        if is_peft:
            owned = adapter_tensor_name(name, attributes)
            if owned is not None:
                if owned[0] == adapter:
                    # If PEFT adapts several parameters of one module, it nests one wrapper in the other, and their
                    # names only differ in the number of `base_layer`s. So these are not stripped here.
                    yield "adapter|" + strip_wrappers(owned[1].removeprefix(prefix)), tensor
                continue
        yield _strip_peft(strip_wrappers(name.removeprefix(prefix))), tensor


def canonical_parameters(model: nn.Module) -> dict[str, Tensor]:
    """
    The parameters of `model` by the names that they have inside DDP, FSDP or `torch.compile`, tied ones once. Where
    FSDP2 shards parameters, they are sharded when this returns.
    """
    reshard(model)
    return {strip_wrappers(name): parameter for name, parameter in model.named_parameters()}


def _peft_prefix(model: nn.Module) -> str:
    # Tuners such as LoRA hold the model one level deeper than prompt-learning adapters do
    config: Any = next(iter(model.peft_config.values()))  # type: ignore[operator]
    return "base_model." if config.is_prompt_learning else "base_model.model."


def strip_wrappers(name: str) -> str:
    """The name that a parameter or module has in the model itself, inside DDP, FSDP or `torch.compile`."""
    return ".".join(c for c in name.removeprefix("module.").split(".") if c not in _WRAPPER_COMPONENTS)


def _strip_peft(name: str) -> str:
    # PEFT moves a module that it wraps to `base_layer` or `original_module` of the wrapper
    return ".".join(c for c in name.split(".") if c not in ("base_layer", "original_module"))


def _digest_tensor(tensor: Tensor) -> str:
    digest = xxhash.xxh3_128(f"{tuple(tensor.shape)}|{tensor.dtype}".encode())
    for part in plain_parts(tensor):
        flat = part.contiguous().reshape(-1)
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _canonical_json(config: Any, irrelevant: frozenset[str]) -> bytes:
    if config is None:
        return b"null"
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return json.dumps(_without(values, irrelevant), sort_keys=True, default=str).encode()


def _without(value: Any, keys: frozenset[str]) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _without(v, keys) for k, v in value.items() if k not in keys}
    if isinstance(value, set | frozenset):
        return sorted(_without(v, keys) for v in value)
    if isinstance(value, list | tuple):
        return [_without(v, keys) for v in value]
    return value
