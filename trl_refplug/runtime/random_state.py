"""Read the state of the global random number generators, and keep it from changing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def rng_kept() -> Iterator[None]:
    """Restore the state of the global generators (Python, NumPy, torch on CPU and CUDA) when the context ends."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def random_state() -> dict[str, Any]:
    """The state of the global generators by library. Two results are equal if no number was drawn in between."""
    numpy: Any = np.random.get_state()
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda = torch.cuda.get_rng_state_all() if started else []
    return {
        "python": random.getstate(),
        "numpy": (numpy[1].tobytes(), *numpy[2:]),
        "torch": tuple(state.numpy().tobytes() for state in (torch.get_rng_state(), *cuda)),
    }
