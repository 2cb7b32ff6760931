"""A whole model that follows another one of the same architecture, parameter by parameter and shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from trl_refplug.errors import ConfigurationError, did_you_mean
from trl_refplug.models.identity import canonical_parameters, strip_wrappers
from trl_refplug.models.sharding import Part, discard_gathered, full_shape, is_sharded, local_part, part_of
from trl_refplug.providers.ema.tensor_files import TensorReader, write_tensors
from trl_refplug.runtime.ranks import sum_over_ranks


if TYPE_CHECKING:
    from torch import Tensor, nn


class MovingModel:
    """
    What all whole models that follow the policy have in common. A subclass decides how the reference moves, and may
    keep it, or more, in tensors of its own.

    Args:
        reference (`nn.Module`): The reference, already placed and sharded as it will be. It is changed in place.
        policy (`Callable`): Returns the policy, which the trainer may still wrap before training starts.
    """

    def __init__(self, reference: nn.Module, policy: Callable[[], nn.Module]) -> None:
        self._reference = reference
        self._policy = policy

    def check_same_architecture(self) -> None:
        """
        Check that every parameter of the reference has its counterpart in the policy.

        Raises:
            ConfigurationError: Names or shapes differ.
        """
        for _ in self._pairs():
            pass

    @property
    def sharded(self) -> bool:
        """Whether every rank holds, and saves, another part of the reference."""
        return any(is_sharded(tensor) for tensor in canonical_parameters(self._reference).values())

    @torch.no_grad()
    def distance_to_policy(self) -> float:
        """Return `|policy - reference| / |policy|` over all parameters. If sharded, the ranks add up two scalars."""
        sums: dict[bool, list[Tensor]] = {True: [], False: []}  # by whether the tensor is sharded
        for name, ours, theirs in self._pairs():
            policy = local_part(theirs)
            reference = self._precise(name, local_part(ours)).to(policy.device)
            if policy.is_floating_point():
                difference = torch.linalg.vector_norm(policy.to(reference.dtype) - reference, dtype=torch.float32)
                size = torch.linalg.vector_norm(policy, dtype=torch.float32)
                # They are summed on the CPU: the model may be spread over devices, and not all of them know float64.
                sums[is_sharded(theirs)].append(torch.stack([difference, size]).cpu().double().square())
        total = torch.zeros(2, dtype=torch.float64)
        for sharded, squares in sums.items():
            if squares:
                squared = torch.stack(squares).sum(dim=0)
                total += sum_over_ranks(squared) if sharded else squared
        difference_squared, size_squared = total.tolist()
        return float((difference_squared / size_squared) ** 0.5) if size_squared else 0.0

    def counters(self) -> dict[str, float]:
        """Return further numbers for the logs: there are none."""
        return {}

    def training_begins(self) -> None:
        """Nothing has to be done: the reference was placed before."""

    def training_ends(self) -> None:
        """Nothing has to be done."""

    @torch.no_grad()
    def save(self, directory: Path, *, rank: int, writes: bool) -> None:
        """Write the reference: this rank's shards, or everything where the trainer `writes`."""
        if writes or self.sharded:
            write_tensors(directory, rank if self.sharded else 0, self._entries(writes))

    @torch.no_grad()
    def load(self, directory: Path) -> None:
        """
        Restore what [`save`] wrote, on any number of ranks.

        Raises:
            ReferenceMismatchError: Something is missing, or belongs to a reference of another shape.
        """
        with TensorReader(directory) as reader:
            self._restore(reader)

    def _precise(self, name: str, reference: Tensor) -> Tensor:
        """Return this rank's part of a parameter in the highest precision in which it is kept."""
        return reference

    def _entries(self, writes: bool) -> Iterator[tuple[str, Tensor, Part, torch.dtype]]:
        """Yield what is saved, in the form that `write_tensors` takes."""
        for name, tensor in canonical_parameters(self._reference).items():
            yield name, self._precise(name, local_part(tensor)), part_of(tensor), tensor.dtype
        if writes:
            for name, buffer in _named_buffers(self._reference, persistent=True).items():
                yield name, buffer, part_of(buffer), buffer.dtype

    def _restore(self, reader: TensorReader) -> None:
        """Copy what was saved into the reference, and into what is kept beside it."""
        for name, tensor in canonical_parameters(self._reference).items():
            reference = local_part(tensor)
            precise = self._precise(name, reference)
            precise.copy_(part_of(tensor).slice_of(reader.whole(name, full_shape(tensor))))
            if precise is not reference:
                reference.copy_(precise)
            discard_gathered(tensor)
        for name, buffer in _named_buffers(self._reference, persistent=True).items():
            buffer.copy_(reader.whole(name, tuple(buffer.shape)))

    def _local_pairs(self) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        """
        Yield, for every parameter, its name, the reference's parameter, and this rank's part of the reference's and of
        the policy's.

        Raises:
            ConfigurationError: The two are sharded differently.
        """
        for name, ours, theirs in self._pairs():
            reference, policy = local_part(ours), local_part(theirs)
            if reference.shape != policy.shape:
                raise ConfigurationError(
                    f"ref_provider='ema': {name} is sharded differently in the policy ({list(policy.shape)} on this "
                    f"rank) and in the reference ({list(reference.shape)})."
                )
            yield name, ours, reference, policy

    def _copy_buffers(self) -> None:
        """Give the reference the buffers of the policy."""
        buffers = _named_buffers(self._policy())
        for name, buffer in _named_buffers(self._reference).items():
            if name in buffers:
                buffer.copy_(buffers[name])

    def _pairs(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield for every parameter its name, and the reference's and the policy's."""
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
    """Return the buffers by name; with `persistent` only those that are part of a state dict."""
    found = {}
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not (persistent and name in module._non_persistent_buffers_set):
                found[strip_wrappers(f"{prefix}.{name}" if prefix else name)] = buffer
    return found
