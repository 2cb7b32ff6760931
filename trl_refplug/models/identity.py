"""
Digests of models: which distribution is this, whatever wrapper or device it sits in.

A digest covers every tensor's canonical name, shape, dtype and bytes, and the configuration, so that two models with
the same digest give the same log-probs. Wrappers (PEFT, DDP, `torch.compile`) do not change it; sharded tensors are
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
from trl_refplug.models.weights import plain_parts


if TYPE_CHECKING:
    from torch import Tensor, nn


# Configuration that cannot change a log-prob: names, versions, and what the tensors or the caller say already.
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
    Digest of the distribution that `model` computes.

    Args:
        model (`nn.Module`): A transformers model, possibly wrapped. Collective under ZeRO-3 and tensor parallelism.
        adapter (`str`, *optional*): For a PEFT model, the adapter whose tensors belong to the distribution; by default
            none do, and the digest is that of the base model, equal to that of the same model never wrapped.

    Returns:
        `str`: 32 hex digits (xxh3-128).
    """
    return combine_digests(model, digest_tensors(model, adapter), adapter)


def digest_tensors(
    model: nn.Module, adapter: str | None = None, dtypes: Mapping[str, torch.dtype] | None = None
) -> dict[str, str]:
    """
    The digest of every tensor `digest_model` covers, by canonical name: to say *which* weights differ.

    Args:
        dtypes (`Mapping[str, torch.dtype]`, *optional*): What to cast tensors to first, by canonical name: FSDP
            upcasts what it trains.
    """
    if not _weights_on_first_rank_only() or any(hasattr(tensor, "full_tensor") for tensor in model.parameters()):
        return _digest_tensors_here(model, adapter, dtypes or {})
    digests = [_digest_tensors_here(model, adapter, dtypes or {}) if torch.distributed.get_rank() == 0 else {}]
    torch.distributed.broadcast_object_list(digests, src=0)
    return digests[0]


def tensor_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """The dtype of every tensor `digest_model` covers, by canonical name."""
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
        # Gathering a shard is collective, so this thread fetches tensors in order; only the hashing is spread.
        for name, tensor in tensors.items():
            if len(pending) >= 2 * workers:  # of a model on an accelerator, only so much is on the host at once
                pending[-2 * workers].result()
            whole = _whole(tensor)
            pending.append(pool.submit(_digest_tensor, whole.to("cpu", dtypes.get(name, whole.dtype))))
        return {name: future.result() for name, future in zip(tensors, pending, strict=True)}


def _weights_on_first_rank_only() -> bool:
    """Whether transformers has loaded weights on the first rank alone, for FSDP to send them to the others later."""
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and all(
            os.environ.get(name, "").lower() in ("1", "true", "yes")
            for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
        )
    )


def combine_digests(model: nn.Module, tensors: Mapping[str, str], adapter: str | None = None) -> str:
    """[`digest_model`] from tensor digests already made."""
    digest = xxhash.xxh3_128(json.dumps(tensors, sort_keys=True).encode())
    digest.update(_canonical_json(getattr(model, "config", None), _IRRELEVANT_CONFIG))
    if adapter is not None:
        digest.update(_canonical_json(model.peft_config[adapter], _IRRELEVANT_ADAPTER_CONFIG))  # type: ignore[index]
    return digest.hexdigest()


def adapter_tensor_name(name: str, adapter_attributes: frozenset[str]) -> tuple[str, str] | None:
    """
    `(adapter, canonical name)` if the parameter called `name` belongs to a PEFT adapter, else `None`.

    `q_proj.lora_A.default.weight` gives `("default", "q_proj.lora_A.weight")`, and
    `lm_head.modules_to_save.default.weight` gives `("default", "lm_head.modules_to_save.weight")`.
    """
    components = name.split(".")
    for position, component in enumerate(components[:-1]):
        if component in adapter_attributes:
            return components[position + 1], ".".join(components[: position + 1] + components[position + 2 :])
    return None


def adapter_attributes(model: nn.Module) -> frozenset[str]:
    """Names of the sub-modules under which PEFT keeps one entry per adapter (`lora_A`, `modules_to_save`, ...)."""
    attributes = {"modules_to_save", "prompt_encoder", "trainable_tokens_delta", "trainable_tokens_original"}
    for module in model.modules():
        for kind in ("adapter_layer_names", "other_param_names"):
            attributes.update(getattr(module, kind, ()))
    return frozenset(attributes)


def canonical_tensors(model: nn.Module, adapter: str | None) -> Iterator[tuple[str, Tensor]]:
    """
    The tensors that decide what `model` computes, by the names that they have in the model itself.

    Args:
        adapter (`str` or `None`): The adapter of a PEFT model whose tensors belong to them.
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
                    # Adapters of several parameters of one module nest, and only `base_layer` tells them apart.
                    yield "adapter|" + strip_wrappers(owned[1].removeprefix(prefix)), tensor
                continue
        yield _strip_peft(strip_wrappers(name.removeprefix(prefix))), tensor


def _peft_prefix(model: nn.Module) -> str:
    # Tuners (LoRA, ...) hold the model one level deeper than prompt learning does.
    config: Any = next(iter(model.peft_config.values()))  # type: ignore[operator]
    return "base_model." if config.is_prompt_learning else "base_model.model."


def strip_wrappers(name: str) -> str:
    """The name that a parameter or module has in the model itself, inside DDP, FSDP or `torch.compile`."""
    return ".".join(c for c in name.removeprefix("module.").split(".") if c not in _WRAPPER_COMPONENTS)


def _strip_peft(name: str) -> str:
    # PEFT moves what it wraps below `base_layer` or `original_module`.
    return ".".join(c for c in name.split(".") if c not in ("base_layer", "original_module"))


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded by ZeRO-3 or as a DTensor."""
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()  # the gathered storage is freed here, while hashing goes on in a thread
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


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
