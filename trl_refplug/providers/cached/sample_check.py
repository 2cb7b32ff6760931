"""Scoring a few stored rows once more, to see whether they were scored with this reference."""

from __future__ import annotations

import numpy as np
import torch

from trl_refplug.errors import ReferenceMismatchError
from trl_refplug.models.tolerances import Tolerance
from trl_refplug.provider import ReferenceProvider, SampleCheck
from trl_refplug.providers.cached.missing_rows import MissingRows
from trl_refplug.rows import PaddedRows


_AT_ONCE = 4  # rows


def check_sample(
    found: MissingRows, source: ReferenceProvider, device: torch.device, tolerance: Tolerance
) -> SampleCheck | None:
    """
    Score the sample of stored rows again. Returns `None` if there is none.

    Raises:
        ReferenceMismatchError: They differ by more than rounding.
    """
    if not found.sample:
        return None
    sample = sorted(found.sample, key=lambda entry: len(entry[0]))
    differences = []
    for start in range(0, len(sample), _AT_ONCE):
        some = sample[start : start + _AT_ONCE]
        padded = PaddedRows.flush_left([row for row, _ in some])
        again = padded.values_by_row(source.log_probs(padded.to_batch(device)))
        differences += [
            np.abs(values.astype(np.float64) - stored) for values, (_, stored) in zip(again, some, strict=True)
        ]
    every = np.concatenate(differences)
    check = SampleCheck(len(sample), float(every.max()), float(every.mean()))
    if not (check.largest <= tolerance.largest and check.mean <= tolerance.mean):  # written so that NaN is refused
        raise ReferenceMismatchError(
            f"{check.rows} rows of the store were scored again, and differ from what it has by up to "
            f"{check.largest:.3g} nats per token (tolerance {tolerance.largest:g}), {check.mean:.3g} on average "
            f"(tolerance {tolerance.mean:g}). The store holds wrong values for this reference, or this machine "
            "computes differently. Use another `path`; `trl-refplug store verify` checks the files."
        )
    return check
