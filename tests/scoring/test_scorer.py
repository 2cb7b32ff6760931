"""Packed scoring is compared with TRL's own call, over architectures, shapes and dtypes."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.trainer.utils import add_fused_lm_head

from tests.scoring.models import ARCHITECTURES, SEEING, VOCAB, batch_of, random_batch, tiny, with_images
from trl_refplug import ConfigurationError
from trl_refplug.models.tolerances import disagreement
from trl_refplug.provider import ReferenceBatch
from trl_refplug.rows import PaddedRows, Row
from trl_refplug.scoring import ExactFallbackWarning, Scorer, ScoreStats, attention
from trl_refplug.scoring.head import Head


TOLERANCE = 2e-5
"""Nats per token in float32, for models whose logits are of order 1; see docs/scoring.md."""

PADDED_LEFT = [kind for kind in ARCHITECTURES if kind != "gpt2"]


@pytest.fixture(autouse=True)
def _no_fallback():
    """Make a fallback an error where none is expected, as the exact call would be compared with itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", ExactFallbackWarning)
        yield


def trl_log_probs(model, batch, temperature=1.0, cast=False):
    """The answer of TRL's call. It is made on a copy, so that nothing the scorer does to the model changes it."""
    model = copy.deepcopy(model)
    model.__dict__.pop("forward", None)
    add_fused_lm_head(model, temperature=temperature, cast_lm_head_to_fp32=cast)
    with torch.no_grad():
        return model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            labels=batch.labels,
            fused_lm_head=True,
        ).log_probs


def trusted(model, **options):
    """A packed scorer that has verified its packed answers already."""
    scorer = Scorer(model, mode="packed", **options)
    scorer.log_probs(random_batch(seed=99))
    assert scorer.stats.fallback is None
    return scorer


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_exact_is_trls_call_bit_for_bit(kind):
    model, batch = tiny(kind), random_batch()
    assert torch.equal(Scorer(model).log_probs(batch), trl_log_probs(model, batch))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_packed_agrees_with_trl(kind, side):
    if side == "left" and kind not in PADDED_LEFT:
        pytest.skip("declined: see test_packable.py")
    model, batch = tiny(kind), random_batch(size=3, side=side)
    scorer = trusted(model)
    found, expected = scorer.log_probs(batch), trl_log_probs(model, batch)
    assert found.dtype == torch.float32
    assert found.shape == (len(batch.input_ids), batch.input_ids.shape[1] - 1)
    assert (found[batch.labels[:, 1:] == -100] == 0).all()
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_packed_agrees_whatever_the_attention_implementation(implementation):
    model, batch = tiny("llama"), random_batch()
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(trusted(model).log_probs(batch), trl_log_probs(model, batch), rtol=0, atol=TOLERANCE)
    assert model.config._attn_implementation == implementation


def test_packed_agrees_with_attention_softcapping():
    model, batch = tiny("gemma2", attn_logit_softcapping=2.0), random_batch()
    model.set_attn_implementation("eager")
    torch.testing.assert_close(trusted(model).log_probs(batch), trl_log_probs(model, batch), rtol=0, atol=TOLERANCE)


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("options", [{}, {"attn_logit_softcapping": 2.0}])
def test_flex_attention_agrees(monkeypatch, options):
    """Run on the CPU what is otherwise run on CUDA."""
    monkeypatch.setattr(attention, "FLEX_DEVICES", {"cpu"})
    monkeypatch.delattr(attention, "_by_node")
    model = tiny("gemma2" if options else "llama", head_dim=16, **options)
    model.set_attn_implementation("eager")
    scorer = trusted(model)
    for seed in range(3):
        batch = random_batch(seed=seed, groups=2 + seed)
        torch.testing.assert_close(scorer.log_probs(batch), trl_log_probs(model, batch), rtol=0, atol=TOLERANCE)
    assert scorer.stats.fallback is None


@pytest.mark.parametrize(("head_dim", "dtype"), [(8, torch.float32), (16, torch.float64)])
def test_what_flex_attention_cannot_compute_is_packed_without_it(monkeypatch, head_dim, dtype):
    monkeypatch.setattr(attention, "FLEX_DEVICES", {"cpu"})
    monkeypatch.delattr(attention, "_flex")
    model, batch = tiny("llama", head_dim=head_dim).to(dtype), random_batch()
    scorer = trusted(model)
    torch.testing.assert_close(scorer.log_probs(batch), trl_log_probs(model, batch), rtol=0, atol=TOLERANCE)
    assert scorer.stats.fallback is None


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", SEEING)
def test_the_text_side_of_a_vision_language_model_is_packed(kind, side):
    model, batch = with_images(kind, **SEEING[kind]), random_batch(side=side)
    batch.input_ids[batch.input_ids > 56] = 3  # tokens that stand for images
    batch.labels[batch.labels > 56] = 3
    expected = trl_log_probs(model, batch)
    scorer = Scorer(model, mode="packed")
    for _ in range(2):
        torch.testing.assert_close(scorer.log_probs(batch), expected, rtol=0, atol=TOLERANCE)
    assert scorer.stats.fallback is None


@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi", "granite"])
@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_packed_divides_logits_by_the_temperature(kind, temperature):
    model, batch = tiny(kind), random_batch()
    expected = trl_log_probs(model, batch, temperature)
    assert (expected - trl_log_probs(model, batch)).abs().max() > 0.1
    found = trusted(model, temperature=temperature).log_probs(batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def test_a_head_the_trainer_added_is_kept():
    model, batch = tiny("llama"), random_batch()
    add_fused_lm_head(model, temperature=0.5)
    forward = model.forward
    scorer = Scorer(model, temperature=0.5)
    assert model.forward == forward
    assert torch.equal(scorer.log_probs(batch), trl_log_probs(model, batch, 0.5))


def test_what_is_scored_is_the_label_and_not_the_token():
    model, batch = tiny("llama"), random_batch(size=3)
    others = torch.randint(3, VOCAB, batch.labels.shape, generator=torch.Generator().manual_seed(0))
    other = replace(batch, labels=torch.where(batch.labels == -100, -100, others))
    found, expected = trusted(model).log_probs(other), trl_log_probs(model, other)
    assert (expected - trl_log_probs(model, batch)).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


class Outermost(torch.nn.Module):
    """Like a wrapper of accelerate or FSDP: it only takes effect if its own `forward` is called."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.calls = 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.module(*args, **kwargs)


@pytest.mark.parametrize("mode", ["exact", "packed"])
def test_every_pass_goes_through_the_outermost_forward(mode):
    model = Outermost(tiny("llama"))
    scorer = trusted(model) if mode == "packed" else Scorer(model)
    before = model.calls, scorer.stats.forwards
    scorer.log_probs(random_batch())
    list(scorer.score_rows(PaddedRows.from_batch(random_batch(seed=1)).rows))
    assert model.calls - before[0] == scorer.stats.forwards - before[1] == 2


def test_the_fused_head_is_the_tiled_one():
    """The fused head that GPUs use, in TRL's implementation without Triton."""
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(40, 16), torch.randn(60, 16), torch.randn(60)
    targets = torch.randint(60, (40,))
    for head in (Head(1.0, None, 1.0, False), Head(0.25, 3.0, 0.7, False)):
        for b in (None, bias):
            found, expected = head._fused(hidden, targets, weight, b), head._tiled(hidden, targets, weight, b)
            torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


lists = st.lists(st.integers(3, VOCAB - 1), max_size=9)


budgets = st.sampled_from([4, 16, 2048])


@st.composite
def batches(draw):
    """Batches in which some rows are copies or prefixes of others, and in which any tokens are scored."""
    prompts = draw(st.lists(lists.filter(len), min_size=1, max_size=3))
    pairs = draw(st.lists(st.tuples(st.sampled_from(prompts), lists), min_size=1, max_size=6))
    pairs += [(prompt, completion[: draw(st.integers(0, 9))]) for prompt, completion in pairs if draw(st.booleans())]
    batch = batch_of(
        [prompt for prompt, _ in pairs],
        [completion for _, completion in pairs],
        draw(st.sampled_from(["left", "right"])),
        draw(st.integers(0, 2)),
    )
    if draw(st.booleans()):  # turns of several speakers
        size = batch.labels.numel()
        unscored = torch.tensor(draw(st.lists(st.booleans(), min_size=size, max_size=size)))
        batch.labels[unscored.view_as(batch.labels)] = -100
    return batch


MODELS = {kind: tiny(kind) for kind in ("llama", "gemma2", "qwen3", "phi")}
MODELS["half"] = tiny("llama").bfloat16()
SCORERS = {kind: trusted(copy.deepcopy(model)) for kind, model in MODELS.items()}


@settings(deadline=None, max_examples=60)
@given(batch=batches(), kind=st.sampled_from([kind for kind in MODELS if kind != "half"]), budget=budgets)
def test_packed_agrees_on_any_batch(batch, kind, budget):
    scorer = SCORERS[kind]
    scorer._packed.budget = budget
    found, expected = scorer.log_probs(batch), trl_log_probs(MODELS[kind], batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@settings(deadline=None, max_examples=30)
@given(batch=batches(), budget=budgets)
def test_in_half_precision_packed_agrees_on_any_batch(batch, budget):
    scorer = SCORERS["half"]
    scorer._packed.budget = budget
    found, expected = scorer.log_probs(batch), trl_log_probs(MODELS["half"], batch)
    scored = batch.labels[:, 1:] != -100
    assert not scored.any() or disagreement(found[scored], expected[scored], torch.bfloat16) is None
    assert (found[~scored] == 0).all()


@st.composite
def masked(draw):
    """Batches with holes in their masks, completely masked rows, and masked tokens that are scored."""
    batch = draw(batches())
    size = batch.labels.numel()
    bits = st.lists(st.booleans(), min_size=size, max_size=size).map(torch.tensor)
    mask, scored = (draw(bits).view_as(batch.labels) for _ in range(2))
    return replace(batch, attention_mask=mask.long(), labels=batch.input_ids.masked_fill(~scored, -100))


@settings(deadline=None, max_examples=60)
@given(batch=masked(), kind=st.sampled_from(["llama", "gemma2"]))
def test_packed_agrees_under_any_mask(batch, kind):
    """Most of these batches cannot be packed, and fall back to the exact call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExactFallbackWarning)
        found = SCORERS[kind].log_probs(batch)
    torch.testing.assert_close(found, trl_log_probs(MODELS[kind], batch), rtol=0, atol=TOLERANCE, equal_nan=True)


@settings(deadline=None, max_examples=30)
@given(batch=batches(), mode=st.sampled_from(["exact", "packed"]), budget=st.integers(4, 60))
def test_streamed_rows_agree_and_come_once(batch, mode, budget):
    real = batch.attention_mask.bool()
    rows = [Row(ids[own].numpy(), labels[own].numpy()) for ids, labels, own in zip(*stacked(batch), real, strict=True)]
    scorer = SCORERS["llama"] if mode == "packed" else Scorer(MODELS["llama"])
    scorer._packed.budget = budget
    answers = dict(scorer.score_rows(iter(rows)))
    expected = trl_log_probs(MODELS["llama"], batch)
    assert sorted(answers) == list(range(len(rows)))
    for index, answer in answers.items():
        columns = real[index].nonzero().squeeze(1)[torch.from_numpy(rows[index].scored)]
        torch.testing.assert_close(answer, expected[index, columns - 1], rtol=0, atol=TOLERANCE)


def stacked(batch: ReferenceBatch):
    return batch.input_ids, batch.labels


def test_a_stream_is_not_read_further_ahead_than_its_window():
    read = []

    def rows():
        for index in range(10_000):
            read.append(index)
            yield Row.completion([5, 6], [7, 8])

    answers = Scorer(MODELS["llama"], token_budget=16).score_rows(rows())
    next(answers)
    assert len(read) <= 32 * 16 // 4


def test_counts():
    scorer = trusted(tiny("llama"))
    before = copy.copy(scorer.stats)
    batch = batch_of([[5] * 20] * 2, [[6, 7], [8, 9, 10]])
    scorer.log_probs(batch)
    assert scorer.stats.rows - before.rows == 2
    assert scorer.stats.padded_tokens - before.padded_tokens == 2 * 23
    assert scorer.stats.unique_tokens - before.unique_tokens == 20 + 1 + 2
    assert scorer.stats.scored_tokens - before.scored_tokens == 5
    assert scorer.stats.forwards - before.forwards == 1
    assert scorer.stats.seconds > before.seconds
    assert scorer.stats.fallback is None
    scorer.stats.clear()
    assert scorer.stats == ScoreStats()


@pytest.mark.parametrize("mode", ["exact", "packed"])
def test_scoring_has_no_side_effects(mode):
    model = tiny("llama", attention_dropout=0.5).train()
    model.model.layers[1].eval()
    model.model.norm.requires_grad_(False)
    batch = random_batch()
    before = [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]
    inputs = batch.input_ids.clone(), batch.labels.clone()
    state = torch.get_rng_state()
    scorer = Scorer(model, mode=mode)
    first = scorer.log_probs(batch)
    assert not first.requires_grad
    expected = first.clone()
    first.zero_()
    assert torch.equal(scorer.log_probs(batch), expected)  # no dropout, and the zeroed tensor is not used
    assert torch.equal(torch.get_rng_state(), state)
    assert before == ([module.training for module in model.modules()], [p.requires_grad for p in model.parameters()])
    assert torch.equal(batch.input_ids, inputs[0])
    assert torch.equal(batch.labels, inputs[1])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_model_generates_and_trains_as_before():
    model, batch = tiny("llama"), random_batch()
    logits = model(input_ids=batch.input_ids).logits
    scorer = trusted(model)
    scorer.log_probs(batch)
    assert torch.equal(model(input_ids=batch.input_ids).logits, logits)
    model(input_ids=batch.input_ids, labels=batch.input_ids).loss.backward()


@pytest.mark.parametrize("options", [{"mode": "fast"}, {"token_budget": 0}])
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match="expected"):
        Scorer(tiny("llama"), **options)


def test_a_model_without_a_language_model_is_refused():
    with pytest.raises(ConfigurationError, match="causal LM"):
        Scorer(torch.nn.Linear(2, 2))
