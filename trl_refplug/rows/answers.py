"""What a provider's answer has to look like, whoever asks: the trainer or the tests of a plugin."""

from __future__ import annotations

from typing import Any

import torch

from trl_refplug.provider import ReferenceBatch


def form_problem(answer: Any, batch: ReferenceBatch) -> str:
    """What is wrong with the form of an answer to `batch`; an empty string if nothing is."""
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
