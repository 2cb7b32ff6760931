"""Tensors on disk as safetensors, whole or in the parts that ranks hold, readable on any number of ranks."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from trl_refplug.errors import ReferenceMismatchError
from trl_refplug.models.sharding import Part


if TYPE_CHECKING:
    from torch import Tensor


_PATTERN = "reference-{rank:05d}-{number:05d}.safetensors"
_BYTES_PER_FILE = 4 * 2**30  # bounds what is copied to the CPU at once


def write_tensors(directory: Path, rank: int, tensors: Iterable[tuple[str, Tensor, Part, torch.dtype]]) -> None:
    """
    Write this rank's parts.

    Args:
        directory (`Path`): Where, the same for all ranks.
        rank (`int`): This rank.
        tensors: Name, part, where it sits in the whole, and the dtype in which the reference computes with it.
    """
    number = size = 0
    batch: dict[str, Tensor] = {}
    layout: dict[str, str] = {}

    def flush() -> None:
        nonlocal number, size
        if batch:
            save_file(batch, directory / _PATTERN.format(rank=rank, number=number), metadata=layout)
        batch.clear()
        layout.clear()
        number, size = number + 1, 0

    for name, tensor, part, dtype in tensors:
        if size and size + tensor.nbytes > _BYTES_PER_FILE:
            flush()
        # A copy even on the CPU: ZeRO-3 cuts its parts from one buffer, and safetensors refuses shared memory.
        batch[name] = tensor.detach().to("cpu", copy=True).contiguous()
        layout[name] = json.dumps([part.shape, part.offset, str(dtype).removeprefix("torch.")])
        size += tensor.nbytes
    flush()


def clear_tensors(directory: Path) -> None:
    """Remove what another run has left in a checkpoint that is written anew: more ranks leave more files."""
    for path in directory.glob("reference-*.safetensors"):
        path.unlink()


class TensorReader:
    """The whole tensors of a directory that all ranks have written to. A context manager."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stack = ExitStack()
        self._parts: dict[str, list[tuple[Any, Part]]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        """The dtype in which the reference computes with each tensor; it may be stored in a wider one."""

    def __enter__(self) -> TensorReader:
        for path in sorted(self._directory.glob("reference-*.safetensors")):
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt"))
            except Exception as error:
                raise ReferenceMismatchError(f"{path} cannot be read ({error}); the checkpoint is damaged.") from error
            for name, values in (file.metadata() or {}).items():
                shape, offset, dtype = json.loads(values)
                size = tuple(file.get_slice(name).get_shape())
                self._parts.setdefault(name, []).append((file, Part(tuple(shape), tuple(offset), size)))
                self.dtypes[name] = getattr(torch, dtype)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._parts)

    def whole(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """
        The whole tensor called `name`, on the CPU.

        Raises:
            ReferenceMismatchError: There is no such tensor, it has another shape, or a rank's part is missing.
        """
        parts = self._found(name)
        cut = parts[0][1].shape
        if cut not in (shape, (prod(shape),)):
            raise ReferenceMismatchError(f"{self._directory}: {name!r} is {list(cut)}; expected {list(shape)}.")
        if parts[0][1].size == cut:
            tensor: Tensor = parts[0][0].get_tensor(name)
            return tensor.reshape(shape)
        whole = torch.empty(cut, dtype=parts[0][0].get_tensor(name).dtype)
        # A part is known by its offset: replicas write the same one more than once.
        for file, part in parts:
            part.slice_of(whole).copy_(file.get_tensor(name))
        if sum({part.offset: prod(part.size) for _, part in parts if prod(part.size)}.values()) != prod(cut):
            raise ReferenceMismatchError(
                f"{self._directory} lacks parts of {name!r}: a rank's file is missing, the checkpoint is damaged."
            )
        return whole.reshape(shape)

    def shape(self, name: str) -> tuple[int, ...]:
        """
        Shape in which the tensor was cut into parts: its own, or flat under ZeRO-3.

        Raises:
            ReferenceMismatchError: There is no such tensor.
        """
        return self._found(name)[0][1].shape

    def _found(self, name: str) -> list[tuple[Any, Part]]:
        if name not in self._parts:
            raise ReferenceMismatchError(f"{self._directory} has no {name!r}; the checkpoint is damaged.")
        return self._parts[name]
