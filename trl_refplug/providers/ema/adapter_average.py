"""A moving average of LoRA adapters, held in a second adapter of the policy: no second model, no dense delta."""

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
        error (`float`): Bound on the Frobenius norm of what recompression has left out of `matrix`.
    """

    matrix: LowRank
    scale: Tensor | None
    error: float = 0.0

    def on(self, device: torch.device) -> _Product:
        """The same there."""
        matrix = LowRank(self.matrix.left.to(device), self.matrix.right.to(device))
        return _Product(matrix, None if self.scale is None else self.scale.to(device), self.error)


class AdapterAverage:
    """
    `reference = alpha * policy + (1 - alpha) * reference` for the weights that a LoRA policy computes with.

    The masters are kept whole, outside the model; the second adapter holds their rounding, padded with zeros to a
    rank that never changes. Of a sharded policy one module at a time is gathered.

    Args:
        policy (`Callable`): Looks the policy up, as it is wrapped when training starts. It gets the second adapter
            now, before it is.
        options ([`EmaOptions`]): `average`, `tolerance` and `max_rank`.
        dtype (`torch.dtype`): Least precision of the masters.
        device (`torch.device` or `None`): Where the masters are; `None` for where the policy is.

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
        self._overflow_told = False
        config = model.peft_config[self._source]
        refuse_unsupported(config)
        self._max_ranks: dict[str, int] = {}
        if self._exact:
            for name, layer in lora_layers(model, self._source):
                self._max_ranks[name] = max_rank(name, layer, self._source, options)
        _add_second_adapter(model, second_config(config, self._max_ranks))
        second = adapter_parameters(model, REFERENCE_ADAPTER)
        for name, parameter in adapter_parameters(model, self._source).items():
            second[name].data = second[name].data.to(parameter.dtype)  # the precision the policy computes in
        freeze_adapter(model, REFERENCE_ADAPTER)
        self._products: dict[str, _Product] = {}
        self._values: dict[str, Tensor] = {}
        self.update(alpha=1.0)

    @property
    def sharded(self) -> bool:
        """Whether every rank saves a part: never, as the masters are whole on all of them."""
        return False

    @torch.no_grad()
    def update(self, alpha: float) -> None:
        """Move the reference towards the policy; with `alpha` 1 it becomes the policy, whatever it was."""
        overflows: list[tuple[int, str, float]] = []
        for name, layer in self._layers():
            with added_by(layer, self._source, self._dtype, self._device) as (matrix, scale):
                product = self._products.get(name)
                if product is None or alpha == 1:
                    self._products[name] = product = _Product(_owned(matrix), scale)
                else:
                    kept = 1.0 - alpha
                    total = weighted_sum([(kept, product.matrix), (alpha, matrix)])
                    smaller = total.recompressed(self._tolerance, self._max_ranks[name])
                    error = kept * product.error + smaller.left_out
                    if product.scale is not None and scale is not None:
                        scale = kept * product.scale + alpha * scale
                    self._products[name] = product = _Product(smaller.matrix, scale, error)
                    if smaller.needed > self._max_ranks[name]:
                        overflows.append((smaller.needed, name, smaller.left_out / smaller.norm))
            self._write(layer, product)
        if overflows and not self._overflow_told:
            self._overflow_told = True
            _tell_overflow(overflows, self._max_ranks, self._tolerance)
        for name, theirs, ours in self._other_parameters():
            with gathered([theirs]) as (value,):
                value = value.to(device=self._device, dtype=self._dtype)
                if name not in self._values:
                    self._values[name] = value.clone()
                else:
                    self._values[name].mul_(1.0 - alpha).add_(value, alpha=alpha)
            write_part(ours, self._values[name])

    def counters(self) -> dict[str, float]:
        """The largest rank in use, and the largest bound on the relative error that recompression has left."""
        if not self._products:
            return {}
        errors = [p.error / (p.matrix.norm() or 1.0) for p in self._products.values()]
        return {"rank": float(max(p.matrix.rank for p in self._products.values())), "average_error": max(errors)}

    @torch.no_grad()
    def place(self) -> None:
        """Move the masters to where the policy is by now, unless they have a place of their own."""
        if self._device is not None:
            return
        for name, layer in self._layers():
            with added_by(layer, self._source, self._dtype, self._device) as (matrix, _):
                self._products[name] = self._products[name].on(matrix.left.device)
        for name, theirs, _ in self._other_parameters():
            with gathered([theirs]) as (value,):
                self._values[name] = self._values[name].to(value.device)

    @torch.no_grad()
    def distance(self) -> float:
        """`|policy - reference| / |policy|` over what the adapters add; gathers one module at a time if sharded."""
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
        Write the masters, and beside them the second adapter as PEFT saves one, where the trainer `writes`. Called on
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
            ReferenceMismatchError: Something is missing, or is not the average of such an adapter.
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
                self._write(layer, self._products[name])
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
        """The modules whose products are averaged."""
        return lora_layers(self._model, self._source) if self._exact else iter(())

    def _other_parameters(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, the policy's and the reference's tensor of what is averaged value by value."""
        ours = adapter_parameters(self._model, REFERENCE_ADAPTER)
        for name, theirs in adapter_parameters(self._model, self._source).items():
            if not (self._exact and ".lora_" in name):
                yield name, theirs, ours[name]

    def _write(self, layer: Any, product: _Product) -> None:
        """Into the second adapter: zero-padded, its scaling being 1."""
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


def _owned(matrix: LowRank) -> LowRank:
    """A copy; without rank if it is zero, as that of a new adapter."""
    if not matrix.left.any() or not matrix.right.any():
        return LowRank(matrix.left[:, :0].clone(), matrix.right[:0].clone())
    return LowRank(matrix.left.clone(), matrix.right.clone())


def _add_second_adapter(model: Any, config: Any) -> None:
    if REFERENCE_ADAPTER in model.peft_config:
        model.delete_adapter(REFERENCE_ADAPTER)  # TRL's own, of the policy's rank
    add_adapter(model, REFERENCE_ADAPTER, config)


def _tell_overflow(overflows: list[tuple[int, str, float]], max_ranks: dict[str, int], tolerance: float) -> None:
    needed, name, left_out = max(overflows, key=lambda overflow: overflow[2])
    logger.warning(
        "The average of %d adapted modules needs a higher rank than max_rank allows: that of %s would need rank %d "
        "for tolerance=%g, has %d, and leaves out %.2g of its norm in this sync. Told only once; ref/average_error "
        "in the logs bounds what has been left out in all. Raise max_rank to avoid it.",
        len(overflows),
        name,
        needed,
        tolerance,
        max_ranks[name],
        left_out,
    )
