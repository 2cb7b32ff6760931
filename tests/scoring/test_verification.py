"""Packed answers are trusted only after a comparison on rows that share prefixes, whatever is asked for first."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaModel

from tests.scoring.models import ARCHITECTURES, VOCAB, batch_of, random_batch, tiny
from tests.scoring.test_packable import LeakyLayer, ScarceMemory, stream
from tests.scoring.test_scorer import TOLERANCE, trl_log_probs
from trl_refplug.models.causal_lm import causal_lm
from trl_refplug.rows import Row
from trl_refplug.scoring import ExactFallbackWarning, Scorer
from trl_refplug.scoring.layout import plan
from trl_refplug.scoring.operations import Operations, count_operations
from trl_refplug.scoring.verification import sharing_rows


REAL = [np.arange(3, 25), np.arange(10, 50)]


@given(
    rows=st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=40), max_size=6),
    tokens=st.integers(60, 600),
    limit=st.sampled_from([6, 30, float("inf")]),
)
def test_the_rows_compared_share_on_two_levels(rows, tokens, limit):
    model = tiny("llama")
    made = sharing_rows([np.array(row, np.int64) for row in rows], model.config, tokens, limit)
    longest = max(map(len, made))
    assert longest <= max([6, *map(len, rows)])
    assert longest <= limit
    assert len(made) * longest <= tokens
    (pack,) = plan(made, None, count_operations(causal_lm(model)))
    shared = [node for node in pack.nodes if node.end > node.stop]
    assert any(inner.start >= outer.stop and inner.end <= outer.end for outer in shared for inner in shared)
    assert any(node.start and pack.positions[node.start] == 0 for node in pack.nodes)  # and one row shares nothing
    assert sorted(pack.rows) == list(range(10))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_sharing_pays_for_the_rows_compared(kind):
    model = tiny(kind)
    (pack,) = plan(sharing_rows(REAL, model.config, 200), None, count_operations(causal_lm(model)))
    assert sum(node.end > node.stop for node in pack.nodes) >= 2


def test_the_rows_compared_are_made_of_real_ones_and_fit_the_model():
    config = LlamaConfig(vocab_size=500, max_position_embeddings=60)
    made = sharing_rows(REAL, config, 512)
    assert {token for row in made for token in row.input_ids} <= {token for row in REAL for token in row}
    assert made[0].input_ids[:5].tolist() == REAL[1][:5].tolist()  # the longest
    (pack,) = plan(made, None, Operations(token=1.0, pair=0.001, head=1.0))
    assert len(pack.tokens) <= 60


class Blind(LlamaModel):
    """Ignores the positions that it is given, and takes a token's place in the input for its position."""

    def forward(self, input_ids, position_ids=None, **kwargs):
        return super().forward(input_ids, **kwargs)


def blind():
    model = tiny("llama")
    model.model.__class__ = Blind
    return model


def leaky():
    model = tiny("llama")
    model.model.layers[0].__class__ = LeakyLayer
    return model


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("make", [blind, leaky])
def test_one_row_first_does_not_earn_trust(make, streamed):
    model, batch = make(), random_batch()
    scorer = Scorer(model, mode="packed")
    one = batch_of([[5, 6, 7]], [[8, 9]])
    with pytest.warns(ExactFallbackWarning, match="differ from the exact call's"):
        scorer.log_probs(one)
    found = stream(scorer, batch) if streamed else scorer.log_probs(batch)
    torch.testing.assert_close(found, trl_log_probs(model, batch), rtol=0, atol=TOLERANCE if streamed else 0)


@pytest.mark.parametrize(("make", "dtype"), [(blind, torch.bfloat16), (leaky, torch.float16)])
def test_half_precision_does_not_hide_a_model_that_disagrees(make, dtype):
    with pytest.warns(ExactFallbackWarning, match="differ from the exact call's"):
        Scorer(make().to(dtype), mode="packed").log_probs(random_batch())


@pytest.mark.parametrize("streamed", [False, True])
def test_it_takes_no_more_memory_than_there_is(streamed):
    model, batch = tiny("llama"), random_batch(groups=6)
    expected = trl_log_probs(model, batch)
    model.model.layers[1].__class__ = ScarceMemory
    scorer = Scorer(model, mode="packed")
    found = stream(scorer, batch) if streamed else scorer.log_probs(batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    assert scorer.stats.fallback is None


@pytest.mark.parametrize("budget", [None, 100])
def test_it_happens_once_and_is_bounded(budget):
    model = tiny("llama")
    sizes = []
    model.model.register_forward_pre_hook(
        lambda module, args, inputs: sizes.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    scorer = Scorer(model, mode="packed", token_budget=budget)
    row = Row.completion([5], [6])
    assert [index for index, _ in scorer.score_rows([row, row])] == [0, 1]
    assert len(sizes) == 4  # the comparison makes an exact, a packed and a shifted pass; the fourth scores the rows
    assert max(sizes) <= (budget or 1024)
    list(scorer.score_rows([row]))
    scorer.log_probs(batch_of([[5, 6, 7]], [[8, 9]]))
    assert len(sizes) == 6
    assert scorer.stats.forwards == 3


@pytest.mark.parametrize("positions", [40, 256, 2000])
def test_rows_are_moved_as_far_as_the_model_has_positions(positions):
    model = tiny("llama", max_position_embeddings=positions)
    found = []
    model.model.register_forward_pre_hook(
        lambda module, args, inputs: found.append(inputs.get("position_ids")), with_kwargs=True
    )
    Scorer(model, mode="packed").log_probs(random_batch())
    farthest = max(int(ids.max()) for ids in found if ids is not None)
    assert 512 < farthest < 2000 if positions == 2000 else farthest == positions - 1


def test_a_model_that_answers_nothing_finite_is_said_to():
    model = tiny("llama")
    model.model.norm.weight.data.fill_(torch.nan)
    with pytest.warns(ExactFallbackWarning, match="exact call that are not finite"):
        assert Scorer(model, mode="packed").log_probs(random_batch()).isnan().any()


def test_a_token_that_is_never_predicted_does_not_cost_trust():
    """Its log-prob is minus infinity in packed and in exact scoring."""
    model = tiny("phi")
    model.lm_head.bias.data[: VOCAB // 4] = -torch.inf
    batch = random_batch()
    scorer = Scorer(model, mode="packed")
    torch.testing.assert_close(scorer.log_probs(batch), trl_log_probs(model, batch), rtol=0, atol=TOLERANCE)
    assert scorer.stats.fallback is None
