"""Adding the reference's log-probs to the trainer's data set, as columns with the names that TRL gives them."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset

from trl_refplug.errors import ConfigurationError
from trl_refplug.trainers.requested_batches import indexed_datasets


_AT_ONCE = 16  # rows


def reference_columns(trainer: Any, split: str = "train") -> Dataset:
    """
    The tokenized data set of a DPO or KTO trainer, with the reference's log-probs of every row.

    Args:
        trainer: A trainer of this package, not trained yet.
        split (`str`): `"train"`, `"eval"` if there is one evaluation set, or the name of one of several.

    Returns:
        `Dataset`: The rows that the trainer kept, in their order, with the float32 columns `ref_chosen_logps` and
        `ref_rejected_logps` (DPO), or `ref_logps` and, if the loss has a KL term, `ref_KL_logps` (KTO). They are sums
        over a completion, computed as the trainer does it, so `ld_alpha` has its effect.

    Raises:
        ConfigurationError: It is a trainer of another kind, or it has no such data set.
    """
    session = getattr(trainer, "_refplug_session", None)
    if session is None:
        raise ConfigurationError(
            f"Found a {type(trainer).__name__} without a reference of this package; expected a trainer like "
            "RefPlugDPOTrainer or RefPlugKTOTrainer, or plug(TrainerClass)(...)."
        )
    datasets = indexed_datasets(trainer, session.run.patch_point, split)
    if datasets is None or len(datasets) != 1:
        raise ConfigurationError(
            f"Found {'rows that are not known beforehand' if datasets is None else f'{len(datasets)} data sets'} in "
            f"split {split!r}; expected one data set of DPO or KTO that is no stream. Splits are 'train', 'eval', or "
            "the name of one of several evaluation sets."
        )
    dataset = datasets[0]
    parts: list[tuple[torch.Tensor | None, ...]] = []
    for start in range(0, len(dataset), _AT_ONCE):
        columns = dataset[start : start + _AT_ONCE]
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        batch = trainer._prepare_inputs(trainer.data_collator(rows))
        parts.append(trainer.compute_ref_log_probs(trainer.ref_model, batch))
    names = (
        ["ref_logps", "ref_KL_logps"]
        if "label" in dataset.column_names
        else ["ref_chosen_logps", "ref_rejected_logps"]
    )
    for name, values in zip(names, zip(*parts, strict=True), strict=True):
        if values[0] is not None:
            dataset = dataset.add_column(name, torch.cat(values).float().cpu().numpy())
    return dataset
