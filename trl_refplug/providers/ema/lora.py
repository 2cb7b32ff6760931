"""What LoRA adapters add to the weights of their layers, and the configuration of one that can hold their average."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from trl_refplug.errors import ConfigurationError
from trl_refplug.models.identity import strip_wrappers
from trl_refplug.models.sharding import full_shape, gathered, is_sharded
from trl_refplug.providers.ema.low_rank import LowRank


if TYPE_CHECKING:
    from torch import Tensor

    from trl_refplug.providers.options import EmaOptions


# Times the policy's rank. In the runs that were measured, this was enough for a tolerance of 1e-4 at any alpha.
_DEFAULT_MAX_RANK = 4
_UNSUPPORTED = (
    "lora_bias",
    "target_parameters",
    "layer_replication",
    "megatron_config",
    "ensure_weight_tying",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)


def refuse_unsupported(config: Any) -> None:
    """
    Refuse an adapter that cannot be averaged.

    Raises:
        ConfigurationError: Its configuration has something in it that is not supported.
    """
    from peft import PeftType

    if config.peft_type != PeftType.LORA:
        raise ConfigurationError(
            f"ref_provider='ema' averages LoRA adapters, and the policy's is {config.peft_type.value}. Use "
            "ref_provider='adapter' or 'frozen' with it."
        )
    found = [name for name in _UNSUPPORTED if getattr(config, name, None)]
    if found:
        raise ConfigurationError(
            f"ref_provider='ema' cannot average an adapter with {', '.join(found)}. Leave that out of the adapter's "
            "configuration, or use ref_provider='adapter' or 'frozen'."
        )


def lora_layers(model: Any, adapter: str) -> Iterator[tuple[str, Any]]:
    """Yield the modules that `adapter` adapts, by the name they have in the model itself."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer) and adapter in module.r:
            yield strip_wrappers(name), module


def factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """Return the parameters `A`, `[rank, columns]`, and `B`, `[rows, rank]`, of a module's adapter."""
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


@contextmanager
def added_by(
    layer: Any, adapter: str, dtype: torch.dtype, device: torch.device | None
) -> Iterator[tuple[LowRank, Tensor | None]]:
    """
    Give what an adapter adds to a module's weight, gathered if it is sharded, and with DoRA the factor on every row.
    The module then computes with the weight `scale * W + matrix`.
    """
    right_parameter, left_parameter = factors(layer, adapter)
    dora = layer.use_dora.get(adapter, False)
    tensors = [right_parameter, left_parameter]
    if dora:
        tensors.append(layer.lora_magnitude_vector[adapter].weight)
    with gathered(tensors) as wholes:
        right, left, *magnitude = (whole.to(device=device, dtype=dtype) for whole in wholes)
        matrix = LowRank(left * layer.scaling[adapter], right)
        if not dora:
            yield matrix, None
            return
        with base_weight(layer, left.device) as weight:
            scale = magnitude[0].reshape(-1) / matrix.row_norms(weight)
        yield LowRank(scale[:, None] * matrix.left, right), scale


@contextmanager
def base_weight(layer: Any, device: torch.device) -> Iterator[Tensor]:
    """Give the weight that DoRA scales, `[rows, columns]`, gathered if it is sharded."""
    from peft.utils.integrations import dequantize_module_weight

    base = layer.get_base_layer()
    if is_sharded(base.weight):
        with gathered([base.weight]) as (whole,):
            yield (whole.T if layer.fan_in_fan_out else whole).to(device)
    else:
        weight = dequantize_module_weight(base).detach()
        yield (weight.T if layer.fan_in_fan_out else weight).to(device)


def max_rank(name: str, layer: Any, adapter: str, options: EmaOptions) -> int:
    """
    Return the highest rank that the average of a layer's adapter may have.

    Raises:
        ConfigurationError: The adapter cannot be averaged exactly, or the option `max_rank` is too small.
    """
    right, left = factors(layer, adapter)
    if len(full_shape(right)) != 2 or (layer.use_dora.get(adapter) and adapter in layer.lora_embedding_A):
        kind = f"DoRA on the embedding {name}" if len(full_shape(right)) == 2 else f"LoRA on the convolution {name}"
        raise ConfigurationError(
            f"ref_provider='ema' cannot average {kind} exactly. Use ref_provider_kwargs={{'average': 'factors'}}, or "
            "leave it out of the adapter's target modules."
        )
    rank, columns = full_shape(right)
    asked = _DEFAULT_MAX_RANK * rank if options.max_rank is None else options.max_rank
    if asked < rank:
        raise ConfigurationError(
            f"ref_provider='ema': option max_rank={asked} is less than the rank {rank} of the policy's adapter at "
            f"{name}, so the reference could not even become the policy. Use at least {rank}."
        )
    return max(rank, min(asked, columns, full_shape(left)[0]))  # a matrix has no higher rank than its shorter side


def second_config(config: Any, max_ranks: dict[str, int]) -> Any:
    """Return the configuration of the second adapter. With `max_ranks`, it has these ranks, and the scaling 1."""
    second = copy.deepcopy(config)
    # Other initializations would rewrite the base, or need data. The average is written to the adapter right after.
    second.init_lora_weights = True
    second.loftq_config = {}
    for name in ("eva_config", "corda_config", "lora_ga_config"):
        if hasattr(second, name):
            setattr(second, name, None)
    second.lora_dropout = 0.0
    second.inference_mode = True
    if max_ranks:
        second.r = second.lora_alpha = max(max_ranks.values())
        second.rank_pattern = {name: rank for name, rank in max_ranks.items() if rank != second.r}
        second.alpha_pattern = dict(second.rank_pattern)
        second.use_rslora = False
    return second
