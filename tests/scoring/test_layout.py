"""Every row is answered from exactly its own tokens, and no token is computed more often than it has to be."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_refplug.rows import IGNORED, Row, unpad
from trl_refplug.scoring.layout import Pack, plan
from trl_refplug.scoring.operations import Operations


COST = Operations(token=1.0, pair=0.001, head=1.0)

tokens = st.lists(st.integers(0, 3), max_size=12)


@st.composite
def row_lists(draw):
    """Rows that share prefixes of any length, in which any tokens are scored. Some are copies or prefixes."""
    stems = draw(st.lists(tokens, min_size=1, max_size=4))
    rows = []
    for _ in range(draw(st.integers(0, 10))):
        ids = draw(st.sampled_from(stems)) + draw(tokens)
        scored = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        rows.append(Row(np.array(ids, np.int64), np.where(np.array(scored, bool), np.array(ids, np.int64), IGNORED)))
    return rows


def visible(pack: Pack, query: int) -> list[int]:
    """The tokens that a token sees, in order, as attention derives them from the nodes."""
    return [
        key
        for node in pack.nodes
        if node.start <= query < node.end
        for key in range(node.start, min(query + 1, node.stop))
    ]


@settings(deadline=None, max_examples=100)
@given(rows=row_lists(), budget=st.one_of(st.none(), st.integers(1, 60)))
def test_every_scored_position_is_predicted_from_exactly_its_own_row(rows, budget):
    answered = []
    for pack in plan(rows, budget, COST):
        for index, answers in zip(pack.rows, pack.answers, strict=True):
            row = rows[index]
            answered.append(index)
            assert pack.targets[answers].tolist() == row.labels[row.scored].tolist()
            for position, source in zip(row.scored, pack.sources[answers], strict=True):
                seen = visible(pack, source)
                assert pack.tokens[seen].tolist() == row.input_ids[:position].tolist()
                assert pack.positions[seen].tolist() == list(range(position))
    assert sorted(answered) == [index for index, row in enumerate(rows) if len(row.scored)]


@settings(deadline=None, max_examples=100)
@given(rows=row_lists(), budget=st.integers(1, 60))
def test_packs_stay_under_the_budget_unless_one_row_exceeds_it(rows, budget):
    for pack in plan(rows, budget, COST):
        assert len(pack.tokens) <= max(budget, pack.longest)
        if len(pack.tokens) > budget:
            assert len(pack.nodes) == 1


@settings(deadline=None)
@given(rows=row_lists())
def test_nodes_cover_each_token_once_and_nest(rows):
    for pack in plan(rows, None, COST):
        assert [token for node in pack.nodes for token in range(node.start, node.stop)] == list(
            range(len(pack.tokens))
        )
        for node in pack.nodes:
            inside = [other for other in pack.nodes if node.start < other.start < node.end]
            assert all(other.end <= node.end for other in inside)


@settings(deadline=None)
@given(rows=row_lists())
def test_sharing_never_costs_more_operations(rows):
    alone = sum(pack.operations(COST) for row in rows for pack in plan([row], None, COST))
    assert sum(pack.operations(COST) for pack in plan(rows, None, COST)) <= alone + 1e-6


def completions_of(prompt: int, lengths: list[int]) -> list[Row]:
    rng = np.random.default_rng(0)
    asked = rng.integers(0, 1000, prompt)
    return [Row.completion(asked, rng.integers(1000, 2000, length)) for length in lengths]


def test_a_group_computes_its_prompt_once():
    (pack,) = plan(completions_of(512, [64] * 8), None, COST)
    assert len(pack.tokens) == 512 + 8 * 63  # the last token of a completion predicts nothing
    assert len(pack.targets) == 8 * 64
    assert len(pack.nodes) == 9


def test_identical_rows_are_computed_once():
    rows = completions_of(20, [8])
    (pack,) = plan(rows * 3, None, COST)
    assert len(pack.tokens) == 27
    assert len(pack.targets) == 8
    assert sorted(pack.rows) == [0, 1, 2]


def test_turns_of_a_conversation_nest():
    first = completions_of(30, [10])[0]
    second = Row(np.concatenate([first.input_ids, [7] * 20]), np.concatenate([first.labels, [7] * 20]))
    other = Row(np.concatenate([first.input_ids, [8] * 20]), np.concatenate([first.labels, [8] * 20]))
    (pack,) = plan([second, first, other], None, COST)
    assert len(pack.tokens) == 40 + 2 * 19
    assert len(pack.targets) == 10 + 20 + 20


def test_a_prefix_that_saves_less_than_it_costs_is_not_shared():
    long_rows = [Row.completion([1], [10 + index] * 400) for index in range(2)]
    (pack,) = plan(long_rows, None, COST)
    assert len(pack.tokens) == 800
    assert len(pack.nodes) == 2


def test_a_prompt_is_computed_again_only_where_the_budget_splits_its_group():
    packs = plan([*completions_of(100, [11] * 4), *completions_of(101, [11] * 4)], 145, COST)
    assert [len(pack.tokens) for pack in packs] in ([140, 141], [141, 140])
    packs = plan(completions_of(100, [11] * 4), 125, COST)
    assert [len(pack.tokens) for pack in packs] == [120, 120]


def test_nothing_scored_needs_no_pass():
    assert plan([Row([1, 2], [IGNORED] * 2), Row([], []), Row([3], [3])], 8, COST) == []


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_cut_out_of_their_padding(side):
    ids = np.array([[0, 5, 6], [7, 8, 9]] if side == "left" else [[5, 6, 0], [7, 8, 9]])
    mask = np.array([[0, 1, 1], [1, 1, 1]] if side == "left" else [[1, 1, 0], [1, 1, 1]])
    rows, starts = unpad(ids, mask, np.where(np.isin(ids, [6, 9]), ids, IGNORED))
    assert [row.input_ids.tolist() for row in rows] == [[5, 6], [7, 8, 9]]
    assert starts.tolist() == ([1, 0] if side == "left" else [0, 0])


@pytest.mark.parametrize(
    ("mask", "labels", "message"),
    [
        ([1, 0, 1], [-100, -100, 3], "holes"),
        ([1, 1, 0], [-100, 2, 3], "padding"),
        ([0, 1, 1], [-100, 2, 3], "padding"),
    ],
)
def test_rows_that_depend_on_their_padding_are_refused(mask, labels, message):
    with pytest.raises(ValueError, match=message):
        unpad(np.array([[1, 2, 3]]), np.array([mask]), np.array([labels]))


def test_a_row_has_a_label_per_token():
    with pytest.raises(ValueError, match="one label per token"):
        Row([1, 2, 3], [1, 2])
