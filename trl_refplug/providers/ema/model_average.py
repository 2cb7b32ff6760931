"""A moving average of whole models, parameter by parameter and shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from trl_refplug.errors import ConfigurationError, did_you_mean
from trl_refplug.models.identity import canonical_parameters, strip_wrappers
from trl_refplug.models.sharding import discard_gathered, full_shape, is_sharded, local_part, part_of
from trl_refplug.providers.ema.tensor_files import TensorReader, write_tensors
from trl_refplug.runtime.ranks import sum_over_ranks


if TYPE_CHECKING:
    from torch import Tensor, nn


class MovingAverage(Protocol):
    """A reference that [`update`] moves towards the policy."""

    @property
    def sharded(self) -> bool:
        """Whether every rank saves another part of it."""

    def update(self, alpha: float) -> None:
        """`reference = alpha * policy + (1 - alpha) * reference`."""

    def distance(self) -> float:
        """`|policy - reference| / |policy|`. Collective if sharded."""

    def counters(self) -> dict[str, float]:
        """Further numbers for the logs."""

    def place(self) -> None:
        """The policy is where it will be trained. Called on every rank."""

    def save(self, directory: Path, *, rank: int, writes: bool) -> None:
        """Write it; what is not sharded only where the trainer `writes`. Called on every rank."""

    def load(self, directory: Path) -> None:
        """Restore what [`save`] wrote."""


class ModelAverage:
    """
    `reference = alpha * policy + (1 - alpha) * reference`, in place, with TRL's own operations in TRL's order.

    Where `dtype` is wider than the reference's, or `device` another, the average is kept in masters of that dtype and
    on that device, and the reference holds its rounding: in bfloat16 alone, a small `alpha` moves nothing.

    Args:
        reference (`nn.Module`): The reference, placed and sharded as it will be. Changed by every [`update`].
        policy (`Callable`): Looks the policy up, as it is wrapped when training starts.
        dtype (`torch.dtype`): Least precision of the average.
        device (`torch.device` or `None`): Where masters live; `None` for where the reference is.
    """

    def __init__(
        self,
        reference: nn.Module,
        policy: Callable[[], nn.Module],
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        self._reference = reference
        self._policy = policy
        self._masters: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, tensor in canonical_parameters(reference).items():
                part = local_part(tensor)
                wide = torch.promote_types(dtype, part.dtype)
                if part.is_floating_point() and (part.dtype != wide or part.device != (device or part.device)):
                    self._masters[name] = part.to(device=device, dtype=wide, copy=True)

    @torch.no_grad()
    def update(self, alpha: float) -> None:
        """Move the reference towards the policy. No communication: every rank updates its own shards."""
        for name, ours, theirs in self._pairs():
            reference, part = local_part(ours), local_part(theirs)
            if reference.shape != part.shape:
                raise ConfigurationError(
                    f"ref_provider='ema': {name} is sharded differently in the policy ({list(part.shape)} on this "
                    f"rank) and in the reference ({list(reference.shape)})."
                )
            average = self._masters.get(name, reference)
            if average.is_floating_point():
                average.mul_(1.0 - alpha).add_(part.to(average.device), alpha=alpha)
            else:
                average.copy_(part)
            if average is not reference:
                reference.copy_(average)
            discard_gathered(ours)
        buffers = _named_buffers(self._policy())
        for name, buffer in _named_buffers(self._reference).items():
            if name in buffers:
                buffer.copy_(buffers[name])

    def check(self) -> None:
        """
        Whether every parameter of the reference has its counterpart.

        Raises:
            ConfigurationError: Names or shapes differ.
        """
        for _ in self._pairs():
            pass

    @torch.no_grad()
    def distance(self) -> float:
        """`|policy - reference| / |policy|` over all parameters. Reduces two scalars over ranks if sharded."""
        sums: dict[bool, list[Tensor]] = {True: [], False: []}  # by whether the tensor is sharded
        for name, ours, theirs in self._pairs():
            part = local_part(theirs)
            average = self._masters.get(name, local_part(ours)).to(part.device)
            if part.is_floating_point():
                difference = torch.linalg.vector_norm(part.to(average.dtype) - average, dtype=torch.float32)
                size = torch.linalg.vector_norm(part, dtype=torch.float32)
                # On the CPU: the model may be spread over devices, and not all of them know float64
                sums[is_sharded(theirs)].append(torch.stack([difference, size]).cpu().double().square())
        total = torch.zeros(2, dtype=torch.float64)
        for sharded, squares in sums.items():
            if squares:
                squared = torch.stack(squares).sum(dim=0)
                total += sum_over_ranks(squared) if sharded else squared
        difference_squared, size_squared = total.tolist()
        return float((difference_squared / size_squared) ** 0.5) if size_squared else 0.0

    def counters(self) -> dict[str, float]:
        """None beside the distance."""
        return {}

    def place(self) -> None:
        """Nothing to do: it is placed with the model that it is in."""

    @property
    def sharded(self) -> bool:
        """Whether every rank holds, and saves, another part of the reference."""
        return any(is_sharded(tensor) for tensor in canonical_parameters(self._reference).values())

    @torch.no_grad()
    def save(self, directory: Path, *, rank: int, writes: bool) -> None:
        """Write the average: this rank's shards, or everything where the trainer `writes`."""
        if not (writes or self.sharded):
            return
        tensors = (
            (name, self._masters.get(name, local_part(tensor)), part_of(tensor), tensor.dtype)
            for name, tensor in canonical_parameters(self._reference).items()
        )
        buffers = (
            (name, buffer, part_of(buffer), buffer.dtype)
            for name, buffer in _named_buffers(self._reference, persistent=True).items()
            if writes
        )
        entries = (entry for entries in (tensors, buffers) for entry in entries)
        write_tensors(directory, rank if self.sharded else 0, entries)

    @torch.no_grad()
    def load(self, directory: Path) -> None:
        """
        Restore what [`save`] wrote, on any number of ranks.

        Raises:
            ReferenceMismatchError: Something is missing, or is not a reference of this shape.
        """
        with TensorReader(directory) as reader:
            for name, tensor in canonical_parameters(self._reference).items():
                reference = local_part(tensor)
                average = self._masters.get(name, reference)
                average.copy_(part_of(tensor).slice_of(reader.whole(name, full_shape(tensor))))
                if average is not reference:
                    reference.copy_(average)
                discard_gathered(tensor)
            for name, buffer in _named_buffers(self._reference, persistent=True).items():
                buffer.copy_(reader.whole(name, tuple(buffer.shape)))

    def _pairs(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        references, policies = canonical_parameters(self._reference), canonical_parameters(self._policy())
        if references.keys() != policies.keys():
            odd = sorted(references.keys() ^ policies.keys())
            missing_in = "reference" if odd[0] in policies else "policy"
            known = references if missing_in == "reference" else policies
            raise ConfigurationError(
                f"ref_provider='ema' averages two models parameter by parameter, and {len(odd)} names are in one of "
                f"them only: the {missing_in} has no {odd[0]!r}.{did_you_mean(odd[0], known)} Pass a `ref_model` of "
                "the policy's architecture, or none."
            )
        for name, reference in references.items():
            theirs = policies[name]
            if full_shape(reference) != full_shape(theirs):
                raise ConfigurationError(
                    f"ref_provider='ema': {name} is {list(full_shape(theirs))} in the policy and "
                    f"{list(full_shape(reference))} in the reference. Pass a `ref_model` of the policy's shape, or "
                    "none."
                )
            yield name, reference, theirs


def _named_buffers(model: nn.Module, *, persistent: bool = False) -> dict[str, Tensor]:
    """Buffers by name; with `persistent` only those that a state dict has."""
    found = {}
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not (persistent and name in module._non_persistent_buffers_set):
                found[strip_wrappers(f"{prefix}.{name}" if prefix else name)] = buffer
    return found
