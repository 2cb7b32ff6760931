from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_refplug.store import KEY_BYTES, RowKey, ScoringFacts, tail_scored_keys


FACTS = ScoringFacts("frozen-1234", attention_implementation="sdpa", scoring_mode="exact")
ROW = RowKey(FACTS, token_ids=[5, 6, 7], scored_positions=[1, 2])

texts = st.one_of(st.none(), st.text(max_size=3))
ids = st.lists(st.integers(0, 3), max_size=3)
facts = st.builds(
    ScoringFacts,
    identity_digest=st.text(max_size=3),
    attention_implementation=st.text(max_size=3),
    scoring_mode=st.text(max_size=3),
    temperature=st.sampled_from([0.5, 1.0, np.nextafter(1.0, 2.0)]),
    cast_lm_head_to_fp32=st.booleans(),
    autocast_dtype=texts,
)
row_keys = st.builds(
    RowKey, facts, ids, ids, multimodal_digest=texts, padding_offset=st.sampled_from([-1, 0, 1, 2**40])
)


def known(row: RowKey) -> tuple[object, ...]:
    return (row.facts, tuple(row.token_ids), tuple(row.scored_positions), row.multimodal_digest, row.padding_offset)


@given(row_keys, row_keys)
def test_digests_are_equal_exactly_when_the_rows_are(one: RowKey, other: RowKey) -> None:
    assert (one.digest() == other.digest()) == (known(one) == known(other))


def test_every_fact_changes_the_digest() -> None:
    changed = [
        replace(ROW, facts=replace(FACTS, identity_digest="frozen-1235")),
        replace(ROW, facts=replace(FACTS, attention_implementation="eager")),
        replace(ROW, facts=replace(FACTS, scoring_mode="packed")),
        replace(ROW, facts=replace(FACTS, temperature=0.7)),
        replace(ROW, facts=replace(FACTS, cast_lm_head_to_fp32=True)),
        replace(ROW, facts=replace(FACTS, autocast_dtype="bfloat16")),
        replace(ROW, facts=replace(FACTS, autocast_dtype="")),
        # The encodings of neighboring fields must not run into each other, whatever the fields contain.
        replace(ROW, facts=replace(FACTS, attention_implementation="sdpae", scoring_mode="xact")),
        replace(ROW, facts=replace(FACTS, attention_implementation="a", scoring_mode="btextc")),
        replace(ROW, facts=replace(FACTS, attention_implementation="atextb", scoring_mode="c")),
        replace(ROW, token_ids=[5, 6, 8]),
        replace(ROW, token_ids=[5, 6, 7, 1], scored_positions=[2]),
        replace(ROW, scored_positions=[2]),
        replace(ROW, multimodal_digest="image"),
        replace(ROW, multimodal_digest=""),
        replace(ROW, padding_offset=3),
    ]
    assert len({row.digest() for row in [ROW, *changed]}) == 1 + len(changed)


def test_the_digest_never_changes() -> None:
    """All existing stores depend on these values. A new encoding needs a new domain, not new values here."""
    assert ROW.digest() == bytes.fromhex("c629a1779e19c0a030d7902d3db70f6d")
    assert ROW.digest().hex() in (RowKey.__doc__ or "")
    assert RowKey(
        replace(FACTS, temperature=0.7, cast_lm_head_to_fp32=True, autocast_dtype="bfloat16"),
        [1, 2**40],
        [],
        multimodal_digest="image",
        padding_offset=4,
    ).digest() == bytes.fromhex("7f3f1d1dd96ea5e83393ccdce04618b9")


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16, ">i8"])
def test_any_integer_array_gives_the_digest_of_its_values(dtype: str) -> None:
    array = np.array([5, 0, 6, 0, 7, 0], dtype)[::2]
    assert replace(ROW, token_ids=array, scored_positions=(1, 2)).digest() == ROW.digest()
    assert len(ROW.digest()) == KEY_BYTES


@pytest.mark.parametrize("wrong", [np.array([1.0, 2.0]), np.array([[1, 2]]), np.array([True, False, True])])
def test_what_is_not_a_list_of_integers_is_refused(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match="scored_positions must be a 1-D array of integers"):
        replace(ROW, scored_positions=wrong).digest()


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_no_logits_can_be_divided_by_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be positive and finite"):
        replace(FACTS, temperature=temperature)


@given(facts, st.lists(st.tuples(st.lists(st.integers(0, 2**40), max_size=5), st.integers(0, 6)), max_size=5))
def test_many_keys_at_once(facts: ScoringFacts, rows: list[tuple[list[int], int]]) -> None:
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids, _ in rows])]).astype(int).tolist()
    together = np.array([token for ids, _ in rows for token in ids], np.int64)
    assert tail_scored_keys(facts, together, offsets, [first for _, first in rows]) == [
        RowKey(facts, ids, range(first, len(ids))).digest() for ids, first in rows
    ]
