"""The form that a provider's answer must have. The trainers and the conformance tests both check it here."""

from __future__ import annotations

from typing import Any

import torch

from trl_refplug.provider import ReferenceBatch


def form_problem(answer: Any, batch: ReferenceBatch) -> str:
    """
    Describe what is wrong with the type, shape, dtype, device or finiteness of an answer to `batch`.

    Returns:
        `str`: One or two sentences, the last without its full stop; an empty string if nothing is wrong.
    """
    rows, seq = batch.input_ids.shape
    if not isinstance(answer, torch.Tensor):
        return f"log_probs() returned a {type(answer).__name__}; expected a torch.Tensor"
    if answer.dtype != torch.float32 or tuple(answer.shape) != (rows, seq - 1):
        return (
            f"log_probs() returned {answer.dtype} {list(answer.shape)}; expected torch.float32 [{rows}, {seq - 1}], "
            "one value per shifted label"
        )
    if answer.device != batch.input_ids.device:
        return f"log_probs() answered on {answer.device}; expected {batch.input_ids.device}"
    finite = torch.isfinite(answer)
    if not finite.all():
        row, position = (~finite).nonzero()[0].tolist()
        return (
            f"log_probs() returned {answer[row, position].item()} for token "
            f"{int(batch.labels[row, position + 1])} at row {row}, position {position + 1}; {int((~finite).sum())} of "
            f"{finite.numel()} values are not finite. The reference's weights or its precision are broken"
        )
    return ""
