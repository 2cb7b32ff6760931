"""Predicting what the trainer will ask its reference about a collated batch: one pure function per kind of trainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch

from trl_refplug.provider import ReferenceBatch
from trl_refplug.trainers.trl_patch import PatchPoint


ROW_WISE = frozenset({"token_type_ids", "mm_token_type_ids", "position_ids"})
"""Model inputs, besides ids, mask and labels, that are known to have one row per sequence."""

_PREFERENCE_NON_MODEL = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps"}
_REQUIRED = {"input_ids", "attention_mask", "completion_mask"}
_PLANNED_ROWS = 64  # rows read at a time: more than in a batch of the trainer's, because that is faster
_GENERATED = {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask"}
_GENERATED_MODEL = (
    *("pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes", "image_sizes", "token_type_ids"),
    *("mm_token_type_ids", "image_position_ids"),
)
_UNPAIRED_NON_MODEL = {"completion_mask", "label", "ref_logps", "ref_KL_logps"}


def preference_requests(inputs: Mapping[str, Any]) -> list[ReferenceBatch]:
    """DPO asks about one batch, with the chosen rows first and the rejected rows after them."""
    return [_request({k: v for k, v in inputs.items() if k not in _PREFERENCE_NON_MODEL}, inputs["completion_mask"])]


def unpaired_requests(inputs: Mapping[str, Any]) -> list[ReferenceBatch]:
    """KTO asks about the mismatched rows of the KL term first, if the loss has one, and then about the completions."""
    main = {k: v for k, v in inputs.items() if k not in _UNPAIRED_NON_MODEL and not k.startswith("KL_")}
    requests = [_request(main, inputs["completion_mask"])]
    if "KL_input_ids" in inputs:
        kl = {**main, **{k[3:]: v for k, v in inputs.items() if k.startswith("KL_") and k != "KL_completion_mask"}}
        requests.insert(0, _request(kl, inputs["KL_completion_mask"]))
    return requests


def generated_labels(input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_tokens: int) -> torch.Tensor:
    """GRPO and RLOO: the last `completion_tokens` positions are scored, unless they are padding or masked."""
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[:, :-completion_tokens] = -100
    return labels


def generated_request(inputs: Mapping[str, Any]) -> ReferenceBatch:
    """GRPO and RLOO, as they train: the completions, without what a tool or an environment said."""
    input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    tokens = inputs["completion_ids"].shape[1]
    labels = generated_labels(input_ids, attention_mask, tokens)
    if "tool_mask" in inputs:
        labels[:, -tokens:].masked_fill_(inputs["tool_mask"] == 0, -100)
    extras = {name: inputs[name] for name in _GENERATED_MODEL if inputs.get(name) is not None}
    return ReferenceBatch(input_ids, attention_mask, labels, extras, rows_sliceable=ROW_WISE.issuperset(extras))


def completions_at_hand(inputs: Any) -> ReferenceBatch | None:
    """The completions that a loss is about to be computed on; `None` where they are not TRL's."""
    if isinstance(inputs, Mapping) and _GENERATED.issubset(inputs):
        return generated_request(inputs)
    requests = predicted_requests(inputs)
    return requests[-1] if requests else None


def predicted_requests(inputs: Any) -> list[ReferenceBatch]:
    """
    What the trainer will ask its reference about a batch of its loader. An empty list if the batch does not look like
    one of TRL's collators made it.
    """
    if not isinstance(inputs, Mapping) or not _REQUIRED.issubset(inputs):
        return []
    return unpaired_requests(inputs) if "label" in inputs else preference_requests(inputs)


def planned(trainer: Any, patch_point: PatchPoint, split: str) -> Iterator[ReferenceBatch] | None:
    """
    All that the trainer will ask about a split, in the order of the data set; `None` if that is not known beforehand.
    Every row comes once, but not in the batches that training will make. `split` is `"train"`, `"eval"` (all
    evaluation sets) or the name of one evaluation set.
    """
    datasets = indexed_datasets(trainer, patch_point, split)
    if datasets is None:
        return None
    return chain.from_iterable(
        planned_batches(dataset, trainer.data_collator, trainer.args.device) for dataset in datasets
    )


def indexed_datasets(trainer: Any, patch_point: PatchPoint, split: str) -> list[Any] | None:
    """The data sets of a split; `None` if it has rows that are not known beforehand."""
    dataset = trainer.train_dataset if split == "train" else trainer.eval_dataset
    if isinstance(dataset, Mapping):
        datasets = list(dataset.values()) if split == "eval" else [dataset.get(split)]
    else:
        datasets = [dataset]
    datasets = [dataset for dataset in datasets if dataset is not None]
    if patch_point.online or not all(map(_is_indexed, datasets)):
        return None
    return datasets


def _is_indexed(dataset: Any) -> bool:
    # A `__getitem__` says nothing: streams inherit one from torch's Dataset, which does nothing.
    return hasattr(dataset, "__len__") and not isinstance(dataset, torch.utils.data.IterableDataset)


def planned_batches(dataset: Any, collate: Any, device: torch.device) -> Iterator[ReferenceBatch]:
    """What the trainer will ask about one data set, in the order of its rows."""
    requests = unpaired_requests if "label" in dataset.column_names else preference_requests
    # This does without a DataLoader, because iterating over one draws from the global random stream.
    for start in range(0, len(dataset), _PLANNED_ROWS):
        columns = dataset[start : start + _PLANNED_ROWS]
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        for request in requests(collate(rows)):
            yield request.to(device)


def _request(inputs: dict[str, Any], completion_mask: torch.Tensor) -> ReferenceBatch:
    input_ids = inputs.pop("input_ids")
    attention_mask = inputs.pop("attention_mask")
    labels = input_ids.masked_fill(completion_mask == 0, -100)
    return ReferenceBatch(input_ids, attention_mask, labels, inputs, rows_sliceable=ROW_WISE.issuperset(inputs))
