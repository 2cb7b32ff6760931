"""Rows that are planned column by column have the same keys as the rows that the trainer's own collator makes."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
from datasets import Dataset, Features, List, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from trl_refplug.provider import ModelTraits
from trl_refplug.providers.cached.row_keys import RowKeys
from trl_refplug.store import ScoringFacts
from trl_refplug.trainers.planned_rows import planned_rows
from trl_refplug.trainers.requested_batches import planned
from trl_refplug.trainers.trl_patch import PatchPoint

from .. import tiny
from .runs import DATA, build


FACTS = ScoringFacts("some-model", attention_implementation="sdpa", scoring_mode="packed")
KEYS = RowKeys(FACTS, FACTS, ModelTraits("sdpa", absolute_positions=True, length_limit=None, dtype="float32"))
COLUMNS = {
    "dpo": ("prompt_ids", "chosen_ids", "rejected_ids"),
    "kto": ("prompt_ids", "completion_ids", "KL_completion_ids"),
}


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    """Trainers whose data set and collator are replaced; their reference is not used."""
    out = tmp_path_factory.mktemp("planned")
    path = tiny.saved(out)
    return {kind: build(kind, out, path, args={"ref_provider": "frozen"}) for kind in COLUMNS}


def keys_both_ways(trainer, split="train"):
    patch_point = PatchPoint.find_in(type(trainer))
    by_column = planned_rows(trainer, patch_point, split)
    collated = Counter(
        key for batch in planned(trainer, patch_point, split) for key in KEYS.rows_of_batch(batch).keys(FACTS)
    )
    if by_column is None:
        return None, collated
    blocks = [KEYS.rows_of_plan(rows) for rows in by_column]
    for block in blocks:
        indices = range(len(block))
        assert block.keys(FACTS) == block.keys(FACTS, indices) == [block.keys(FACTS, [index])[0] for index in indices]
        assert block.scored_counts().tolist() == [len(block.row(index).scored) for index in indices]
    return Counter(key for block in blocks for key in block.keys(FACTS)), collated


ids = st.lists(st.integers(0, 300), max_size=7)
rows_of_ids = st.lists(st.tuples(ids.filter(bool), ids, ids), min_size=1, max_size=40)


@pytest.mark.parametrize("kind", list(COLUMNS))
@given(
    rows=rows_of_ids,
    max_length=st.none() | st.integers(1, 12),
    keep_end=st.booleans(),
    kl=st.booleans(),
    order=st.sampled_from(["as it is", "shuffled", "selected"]),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_same_keys(trainers, kind, rows, max_length, keep_end, kl, order):
    names = COLUMNS[kind] if kl or kind == "dpo" else COLUMNS[kind][:2]
    types = Features({name: List(Value("int64")) for name in names})
    data = Dataset.from_dict({name: [row[i] for row in rows] for i, name in enumerate(names)}, features=types)
    if kind == "kto":
        data = data.add_column("label", [True] * len(data))
        collator = DataCollatorForUnpairedPreference(pad_token_id=1, max_length=max_length)
    else:
        mode = "keep_end" if keep_end else "keep_start"
        collator = DataCollatorForPreference(pad_token_id=1, max_length=max_length, truncation_mode=mode)
    if order == "shuffled":
        data = data.shuffle(seed=0)
    elif order == "selected":
        data = data.select(range(0, len(data), 2))
    trainer = trainers[kind]
    trainer.train_dataset, trainer.data_collator = data, collator
    by_column, collated = keys_both_ways(trainer)
    assert by_column == collated


@pytest.mark.parametrize("kind", list(COLUMNS))
def test_of_a_real_run(kind, tmp_path):
    """There are many blocks, filtered rows and several evaluation sets."""
    evaluation = {"one": DATA[kind](5), "two": DATA[kind](7)}
    args = {"ref_provider": "frozen", "max_length": 9}
    trainer = build(
        kind, tmp_path, tiny.saved(tmp_path), args=args, train_dataset=DATA[kind](1500), eval_dataset=evaluation
    )
    for split in ("train", "eval", "one"):
        by_column, collated = keys_both_ways(trainer, split)
        assert by_column == collated
        assert by_column.total() >= 10


@dataclass
class Reversed(DataCollatorForPreference):
    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        return super().torch_call([{**row, "prompt_ids": row["prompt_ids"][::-1]} for row in examples])


def test_not_with_another_collator(tmp_path):
    trainer = build("dpo", tmp_path, tiny.saved(tmp_path), data_collator=Reversed(pad_token_id=1))
    assert keys_both_ways(trainer)[0] is None


def test_not_with_another_trl(tmp_path, monkeypatch):
    """A release of TRL whose collator truncates in another way is noticed."""
    trainer = build("dpo", tmp_path, tiny.saved(tmp_path))
    assert keys_both_ways(trainer)[0] is not None
    collate = DataCollatorForPreference.torch_call

    def other(self, examples):
        inputs = collate(self, examples)
        inputs["completion_mask"][:, -1] = 0
        return inputs

    monkeypatch.setattr(DataCollatorForPreference, "torch_call", other)
    assert keys_both_ways(trainer)[0] is None


def test_not_where_rows_are_made_as_they_are_read(tmp_path):
    trainer = build("dpo", tmp_path, tiny.saved(tmp_path))
    trainer.train_dataset = trainer.train_dataset.with_transform(
        lambda columns: {**columns, "prompt_ids": [[7, *prompt] for prompt in columns["prompt_ids"]]}
    )
    assert keys_both_ways(trainer)[0] is None
