"""Measure how much memory this process has used, and recognize that memory ran out."""

from __future__ import annotations

import sys

import torch
from accelerate.utils.memory import should_reduce_batch_size


_MESSAGES = ("CUDA error: out of memory", "Triton Error [CUDA]: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Messages of the CUDA driver and of libraries that allocate memory themselves. accelerate does not know them."""


def ran_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, so that the same work may succeed in smaller parts."""
    if isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)


def peak_resident_set() -> int:
    """The most memory that this process has had in use so far (its resident set), in bytes."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kibibytes
