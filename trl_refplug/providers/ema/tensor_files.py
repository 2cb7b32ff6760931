"""Tensors in safetensors files, whole or in the parts that the ranks hold. Any number of ranks can read them again."""

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
_BYTES_PER_FILE = 4 * 2**30  # so much is copied to the CPU at once, at most


def write_tensors(directory: Path, rank: int, tensors: Iterable[tuple[str, Tensor, Part, torch.dtype]]) -> None:
    """
    Write this rank's parts of tensors.

    Args:
        directory (`Path`): Where they are written, the same for all ranks.
        rank (`int`): This rank.
        tensors: For each, its name, the part, where the part sits in the whole tensor, and the dtype in which the
            reference computes with it.
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
        # It is copied even on the CPU: ZeRO-3 cuts its parts from one buffer, and safetensors refuses shared memory.
        batch[name] = tensor.detach().to("cpu", copy=True).contiguous()
        layout[name] = json.dumps([part.shape, part.offset, str(dtype).removeprefix("torch.")])
        size += tensor.nbytes
    flush()


def clear_tensors(directory: Path) -> None:
    """Remove what another run left in a checkpoint that is written anew: one with more ranks left more files."""
    for path in directory.glob("reference-*.safetensors"):
        path.unlink()


class TensorReader:
    """A context manager that reads whole tensors from a directory to which all ranks have written their parts."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stack = ExitStack()
        self._parts: dict[str, list[tuple[Any, Part]]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        """The dtype in which the reference computes with each tensor, by name. It may be stored in a wider one."""

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
        """The names of all tensors."""
        return list(self._parts)

    def whole(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """
        Return the whole tensor called `name`, on the CPU.

        Raises:
            ReferenceMismatchError: There is no such tensor, it has another shape, or a rank's part is missing.
        """
        parts = self._parts_of(name)
        cut = parts[0][1].shape
        if cut not in (shape, (prod(shape),)):
            raise ReferenceMismatchError(f"{self._directory}: {name!r} is {list(cut)}; expected {list(shape)}.")
        if parts[0][1].size == cut:
            tensor: Tensor = parts[0][0].get_tensor(name)
            return tensor.reshape(shape)
        whole = torch.empty(cut, dtype=parts[0][0].get_tensor(name).dtype)
        # Parts with the same offset are the same part, which replicas write more than once.
        for file, part in parts:
            part.slice_of(whole).copy_(file.get_tensor(name))
        if sum({part.offset: prod(part.size) for _, part in parts if prod(part.size)}.values()) != prod(cut):
            raise ReferenceMismatchError(
                f"{self._directory} lacks parts of {name!r}: a rank's file is missing, the checkpoint is damaged."
            )
        return whole.reshape(shape)

    def shape(self, name: str) -> tuple[int, ...]:
        """
        Return the shape in which the tensor was cut into parts: its own, or under ZeRO-3 a flat one.

        Raises:
            ReferenceMismatchError: There is no such tensor.
        """
        return self._parts_of(name)[0][1].shape

    def _parts_of(self, name: str) -> list[tuple[Any, Part]]:
        if name not in self._parts:
            raise ReferenceMismatchError(f"{self._directory} has no {name!r}; the checkpoint is damaged.")
        return self._parts[name]
