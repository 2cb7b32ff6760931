"""Rows and their values come out of a padded batch as they were put into it."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_refplug.rows import IGNORED, PaddedRows, Row


@st.composite
def padded_rows(draw):
    """Rows of any length, even empty, with any padding on either side, in which any tokens are scored."""
    lists = draw(st.lists(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=8), max_size=5))
    lefts = [draw(st.integers(0, 4)) if tokens else 0 for tokens in lists]
    rows = []
    for tokens in lists:
        ids = np.array([token for token, _ in tokens], np.int64)
        scored = np.array([place > 0 and scored for place, (_, scored) in enumerate(tokens)], bool)
        rows.append(Row(ids, np.where(scored, ids, IGNORED)))
    width = max((left + len(row) for left, row in zip(lefts, rows, strict=True)), default=0) + draw(st.integers(0, 3))
    return PaddedRows(rows, lefts, max(1, width), draw(st.integers(0, 9)))


@given(padded=padded_rows())
def test_rows_come_out_of_a_batch_as_they_went_in(padded):
    batch = padded.to_batch()
    again = PaddedRows.from_batch(batch)
    assert [row.input_ids.tolist() for row in again.rows] == [row.input_ids.tolist() for row in padded.rows]
    assert [row.labels.tolist() for row in again.rows] == [row.labels.tolist() for row in padded.rows]
    assert (list(again.lefts), again.width, again.tokens) == (padded.lefts, padded.width, padded.tokens)
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(getattr(again.to_batch(), name), getattr(batch, name))


@given(padded=padded_rows(), data=st.data())
def test_values_are_put_where_they_belong(padded, data):
    values = [np.arange(1, 1 + len(row.scored), dtype=np.float32) - 99 * line for line, row in enumerate(padded.rows)]
    table = padded.to_log_probs(values)
    assert table.shape == (len(padded), padded.width - 1)
    assert [found.tolist() for found in padded.values_by_row(table)] == [own.tolist() for own in values]
    scored = padded.to_batch().labels[:, 1:] != IGNORED
    assert (table[~scored] == 0).all()
    kept = sorted(data.draw(st.sets(st.sampled_from(range(len(padded))))) if len(padded) else [])
    some = padded.select(kept)
    assert torch.equal(some.to_log_probs([values[index] for index in kept]), table[kept])
    left_out = padded.to_log_probs([own if line in kept else None for line, own in enumerate(values)])
    assert torch.equal(left_out[kept], table[kept])
    assert (left_out[[line for line in range(len(padded)) if line not in kept]] == 0).all()
