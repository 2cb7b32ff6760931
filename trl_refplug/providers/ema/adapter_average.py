"""A moving average of LoRA adapters. It is a second adapter of the policy, so there is no second model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trl_refplug.models.adapters import (
    REFERENCE_ADAPTER,
    adapter_parameters,
    add_adapter,
    freeze_adapter,
    peft_model_of,
    policy_adapter,
)
from trl_refplug.models.identity import adapter_attributes, adapter_tensor_name
from trl_refplug.models.sharding import Part, full_shape, gathered, reshard, write_part
from trl_refplug.providers.ema.lora import (
    added_by,
    base_weight,
    factors,
    lora_layers,
    max_rank,
    refuse_unsupported,
    second_config,
)
from trl_refplug.providers.ema.low_rank import LowRank, weighted_sum
from trl_refplug.providers.ema.tensor_files import TensorReader, write_tensors


if TYPE_CHECKING:
    from torch import Tensor, nn

    from trl_refplug.providers.options import EmaOptions


logger = logging.getLogger("trl_refplug")


@dataclass
class _Product:
    """
    The average of what one module's adapter adds to its weight.

    Args:
        matrix ([`LowRank`]): The average of `scaling * B @ A`; with DoRA, of `diag(scale) @ (scaling * B @ A)`.
        scale (`Tensor` or `None`): With DoRA, the average of `magnitude / |W + scaling * B @ A|`, `[rows]`.
        error (`float`): Bound on the Frobenius norm of all that recompression has left out of `matrix` so far.
    """

    matrix: LowRank
    scale: Tensor | None
    error: float = 0.0

    def moved_to(self, device: torch.device) -> _Product:
        """Return the same average on `device`."""
        matrix = LowRank(self.matrix.left.to(device), self.matrix.right.to(device))
        return _Product(matrix, None if self.scale is None else self.scale.to(device), self.error)


class AdapterAverage:
    """
    `reference = alpha * policy + (1 - alpha) * reference` for the weights that a LoRA policy computes with.

    The average is kept in masters outside of the model, which are whole on every rank. The second adapter holds the
    masters rounded to its own dtype, padded with zeros to a rank that never changes. If the policy is sharded, one
    module at a time is gathered.

    Args:
        policy (`Callable`): Returns the policy, which the trainer may still wrap before training starts. The policy
            gets the second adapter at once, before it is wrapped.
        options ([`EmaOptions`]): Of these, `average`, `tolerance` and `max_rank` are used.
        dtype (`torch.dtype`): The lowest precision in which the masters may be kept.
        device (`torch.device` or `None`): The device of the masters; `None` for the policy's.

    Raises:
        ConfigurationError: This policy cannot be averaged.
    """

    def __init__(
        self,
        policy: Callable[[], nn.Module],
        options: EmaOptions,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        self._policy = policy
        model = self._model
        self._source = policy_adapter(model)
        self._exact = options.average == "exact"
        self._tolerance = options.tolerance
        self._dtype, self._device = torch.promote_types(dtype, torch.float32), device
        self._warned_of_rank = False
        config = model.peft_config[self._source]
        refuse_unsupported(config)
        self._max_ranks: dict[str, int] = {}
        if self._exact:
            for name, layer in lora_layers(model, self._source):
                self._max_ranks[name] = max_rank(name, layer, self._source, options)
        _add_second_adapter(model, second_config(config, self._max_ranks))
        second = adapter_parameters(model, REFERENCE_ADAPTER)
        for name, parameter in adapter_parameters(model, self._source).items():
            second[name].data = second[name].data.to(parameter.dtype)  # the policy computes in this precision
        freeze_adapter(model, REFERENCE_ADAPTER)
        self._products: dict[str, _Product] = {}
        self._values: dict[str, Tensor] = {}
        self.move_to_policy(alpha=1.0)

    @property
    def sharded(self) -> bool:
        """Whether every rank saves another part: never, because the masters are whole on all of them."""
        return False

    @torch.no_grad()
    def move_to_policy(self, alpha: float) -> None:
        """Move the reference towards the policy. With `alpha` 1 it becomes the policy, whatever it was before."""
        too_high: list[tuple[int, str, float]] = []
        for name, layer in self._layers():
            with added_by(layer, self._source, self._dtype, self._device) as (matrix, scale):
                product = self._products.get(name)
                if product is None or alpha == 1:
                    self._products[name] = product = _Product(_copied(matrix), scale)
                else:
                    kept = 1.0 - alpha
                    total = weighted_sum([(kept, product.matrix), (alpha, matrix)])
                    smaller = total.recompressed(self._tolerance, self._max_ranks[name])
                    error = kept * product.error + smaller.left_out
                    if product.scale is not None and scale is not None:
                        scale = kept * product.scale + alpha * scale
                    self._products[name] = product = _Product(smaller.matrix, scale, error)
                    if smaller.needed > self._max_ranks[name]:
                        too_high.append((smaller.needed, name, smaller.left_out / smaller.norm))
            self._write_to_adapter(layer, product)
        if too_high and not self._warned_of_rank:
            self._warned_of_rank = True
            _warn_of_rank(too_high, self._max_ranks, self._tolerance)
        for name, theirs, ours in self._other_parameters():
            with gathered([theirs]) as (value,):
                value = value.to(device=self._device, dtype=self._dtype)
                if name not in self._values:
                    self._values[name] = value.clone()
                else:
                    self._values[name].mul_(1.0 - alpha).add_(value, alpha=alpha)
            write_part(ours, self._values[name])

    def counters(self) -> dict[str, float]:
        """Return the highest rank in use, and the largest bound on the relative error that recompression has made."""
        if not self._products:
            return {}
        errors = [p.error / (p.matrix.norm() or 1.0) for p in self._products.values()]
        return {"rank": float(max(p.matrix.rank for p in self._products.values())), "average_error": max(errors)}

    @torch.no_grad()
    def training_begins(self) -> None:
        """Move the masters to the device that the policy is on by now, unless they have a device of their own."""
        if self._device is not None:
            return
        for name, layer in self._layers():
            with added_by(layer, self._source, self._dtype, self._device) as (matrix, _):
                self._products[name] = self._products[name].moved_to(matrix.left.device)
        for name, theirs, _ in self._other_parameters():
            with gathered([theirs]) as (value,):
                self._values[name] = self._values[name].to(value.device)

    def training_ends(self) -> None:
        """Nothing has to be done."""

    @torch.no_grad()
    def distance_to_policy(self) -> float:
        """
        Return `|policy - reference| / |policy|` over what the adapters add to the weights. If the policy is sharded,
        one module at a time is gathered.
        """
        difference = size = 0.0
        for name, layer in self._layers():
            with added_by(layer, self._source, self._dtype, self._device) as (matrix, _):
                difference += weighted_sum([(1.0, matrix), (-1.0, self._products[name].matrix)]).norm() ** 2
                size += matrix.norm() ** 2
        for name, theirs, _ in self._other_parameters():
            with gathered([theirs]) as (value,):
                value = value.to(device=self._device, dtype=self._dtype)
                difference += float(torch.linalg.vector_norm(value - self._values[name])) ** 2
                size += float(torch.linalg.vector_norm(value)) ** 2
        return float((difference / size) ** 0.5) if size else 0.0

    @torch.no_grad()
    def save(self, directory: Path, *, rank: int, writes: bool) -> None:
        """
        Write the masters where the trainer `writes`, and beside them the second adapter as PEFT saves one. Called on
        every rank.
        """
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        model = self._model
        attributes = adapter_attributes(model)
        adapter: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            owned = adapter_tensor_name(name, attributes)
            if owned is not None and owned[0] == REFERENCE_ADAPTER:
                with gathered([parameter]) as (whole,):
                    adapter[name] = whole.detach().to("cpu", copy=True).contiguous()
        if not writes:
            return
        tensors = dict(self._values)
        for name, product in self._products.items():
            tensors.update({f"{name}.left": product.matrix.left, f"{name}.right": product.matrix.right})
            tensors[f"{name}.error"] = torch.tensor(product.error, dtype=torch.float64)
            if product.scale is not None:
                tensors[f"{name}.scale"] = product.scale
        entries = (
            (name, t, Part(tuple(t.shape), (0,) * t.dim(), tuple(t.shape)), t.dtype) for name, t in tensors.items()
        )
        write_tensors(directory, 0, entries)
        exported = directory / "adapter"
        exported.mkdir(exist_ok=True)
        state = get_peft_model_state_dict(
            model, state_dict=adapter, adapter_name=REFERENCE_ADAPTER, save_embedding_layers=False
        )
        save_file(state, exported / "adapter_model.safetensors", metadata={"format": "pt"})
        model.peft_config[REFERENCE_ADAPTER].save_pretrained(exported)

    @torch.no_grad()
    def load(self, directory: Path) -> None:
        """
        Restore what [`save`] wrote.

        Raises:
            ReferenceMismatchError: Something is missing, or belongs to the average of another adapter.
        """
        with TensorReader(directory) as reader:
            for name, layer in self._layers():
                rows, columns = self._products[name].matrix.left.shape[0], self._products[name].matrix.right.shape[1]
                rank = reader.shape(f"{name}.left")[-1]
                left = reader.whole(f"{name}.left", (rows, rank)).to(self._device_of(name))
                right = reader.whole(f"{name}.right", (rank, columns)).to(left.device)
                scale = self._products[name].scale
                if scale is not None:
                    scale = reader.whole(f"{name}.scale", tuple(scale.shape)).to(left.device)
                error = float(reader.whole(f"{name}.error", ()))
                self._products[name] = _Product(LowRank(left, right), scale, error)
                self._write_to_adapter(layer, self._products[name])
            for name, _, ours in self._other_parameters():
                self._values[name].copy_(reader.whole(name, tuple(self._values[name].shape)))
                write_part(ours, self._values[name])

    @property
    def _model(self) -> Any:
        policy = self._policy()
        reshard(policy)
        return peft_model_of(policy)

    def _device_of(self, name: str) -> torch.device:
        return self._products[name].matrix.left.device

    def _layers(self) -> Iterator[tuple[str, Any]]:
        """Return the modules whose products are averaged, by name."""
        return lora_layers(self._model, self._source) if self._exact else iter(())

    def _other_parameters(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield the name, the policy's tensor and the reference's tensor of all that is averaged value by value."""
        ours = adapter_parameters(self._model, REFERENCE_ADAPTER)
        for name, theirs in adapter_parameters(self._model, self._source).items():
            if not (self._exact and ".lora_" in name):
                yield name, theirs, ours[name]

    def _write_to_adapter(self, layer: Any, product: _Product) -> None:
        """Write the average to the second adapter, padded with zeros. The adapter's scaling is 1."""
        left, right = product.matrix.left, product.matrix.right
        right_parameter, left_parameter = factors(layer, REFERENCE_ADAPTER)
        if product.scale is not None:
            matrix = LowRank(left / product.scale[:, None], right)
            left = matrix.left
            with base_weight(layer, left.device) as weight:
                magnitude = product.scale * matrix.row_norms(weight)
            write_part(layer.lora_magnitude_vector[REFERENCE_ADAPTER].weight, magnitude)
        padded_left = left.new_zeros(full_shape(left_parameter))
        padded_left[:, : product.matrix.rank] = left
        padded_right = right.new_zeros(full_shape(right_parameter))
        padded_right[: product.matrix.rank] = right
        write_part(left_parameter, padded_left)
        write_part(right_parameter, padded_right)


def _copied(matrix: LowRank) -> LowRank:
    """Return a copy. A matrix of zeros, which is what a new adapter adds, becomes one of rank 0."""
    if not matrix.left.any() or not matrix.right.any():
        return LowRank(matrix.left[:, :0].clone(), matrix.right[:0].clone())
    return LowRank(matrix.left.clone(), matrix.right.clone())


def _add_second_adapter(model: Any, config: Any) -> None:
    if REFERENCE_ADAPTER in model.peft_config:
        model.delete_adapter(REFERENCE_ADAPTER)  # this is TRL's own, which has the policy's rank
    add_adapter(model, REFERENCE_ADAPTER, config)


def _warn_of_rank(too_high: list[tuple[int, str, float]], max_ranks: dict[str, int], tolerance: float) -> None:
    needed, name, left_out = max(too_high, key=lambda each: each[2])
    logger.warning(
        "The average of %d adapted modules needs a higher rank than max_rank allows. That of %s would need rank %d "
        "for tolerance=%g. It has rank %d, which leaves out %.2g of its norm in this sync. This warning comes only "
        "once; ref/average_error in the logs bounds what all syncs have left out. Raise max_rank to avoid it.",
        len(too_high),
        name,
        needed,
        tolerance,
        max_ranks[name],
        left_out,
    )
