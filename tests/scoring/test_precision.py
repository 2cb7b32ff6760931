"""Both ways to score are compared with a float64 run: packed scoring is as precise as the exact call."""

import contextlib
import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from tests.scoring.models import random_batch, tiny
from tests.scoring.test_scorer import trl_log_probs, trusted
from trl_refplug.models.tolerances import PACKING_TOLERANCES, disagreement
from trl_refplug.scoring import ExactFallbackWarning, Scorer, exact_log_probs


def float64_log_probs(model, batch):
    """The log-softmax of the model's own logits in float64, row by row, without padding or fused kernels."""
    model = copy.deepcopy(model).double()
    answer = torch.zeros(batch.labels.shape[0], batch.labels.shape[1] - 1, dtype=torch.float64)
    for line, (ids, mask, labels) in enumerate(zip(batch.input_ids, batch.attention_mask, batch.labels, strict=True)):
        own = mask.bool().nonzero().squeeze(1)
        with torch.no_grad():
            logits = model(input_ids=ids[own][None]).logits[0, :-1].log_softmax(-1)
        wanted = labels[own[1:]]
        values = logits.gather(1, wanted.clamp(min=0)[:, None]).squeeze(1)
        answer[line, own[1:] - 1] = values.masked_fill(wanted == -100, 0.0)
    return answer


KINDS = ["llama", "gemma2", "gpt2", "qwen3", "granite"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_packed_is_as_close_to_float64_as_the_exact_call(kind, dtype):
    batch = random_batch(groups=4, size=4)
    model = tiny(kind).to(dtype)
    reference = float64_log_probs(model, batch)  # has the same rounded weights, so only the computation differs
    scored = batch.labels[:, 1:] != -100
    packed = (trusted(model).log_probs(batch) - reference)[scored].abs()
    exact = (trl_log_probs(model, batch) - reference)[scored].abs()
    eps = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps
    assert packed.mean() <= 1.5 * exact.mean() + eps
    assert packed.max() <= 2 * exact.max() + 16 * eps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", PACKING_TOLERANCES)
def test_tolerances_hold_with_room(kind, dtype):
    batch = random_batch(groups=4, size=4, side="right")
    model = tiny(kind).to(dtype)
    scored = batch.labels[:, 1:] != -100
    differences = (trusted(model).log_probs(batch) - trl_log_probs(model, batch))[scored].abs()
    allowed = PACKING_TOLERANCES[dtype]
    assert differences.max() <= allowed.largest / 2
    assert differences.mean() <= allowed.mean / 2


@pytest.mark.parametrize("dtype", PACKING_TOLERANCES)
def test_what_is_beyond_tolerance_is_told(dtype):
    values = torch.randn(50)
    allowed = PACKING_TOLERANCES[dtype]
    assert disagreement(values, values.clone(), dtype) is None
    assert disagreement(values + 2 * allowed.mean, values, dtype) is not None
    assert disagreement(values + 0.11, values, dtype) is not None  # another model, or another prompt
    one_off = values.clone()
    one_off[7] += 2 * allowed.largest
    assert "differ" in str(disagreement(one_off, values, dtype))
    for odd in (torch.nan, -torch.inf):
        one_off[7] = odd
        assert "differ" in str(disagreement(one_off, values, dtype))
        assert "differ" in str(disagreement(values, one_off, dtype))
        assert disagreement(one_off, one_off.clone(), dtype) is None
    assert "not finite" in str(disagreement(values, values * torch.nan, dtype))


@contextlib.contextmanager
def accelerator(precision):
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield Accelerator(mixed_precision=precision, cpu=True)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("cast", [False, True])
def test_packed_runs_under_the_autocast_of_a_prepared_model(cast):
    batch = random_batch(groups=4, size=4)
    model = tiny("llama")
    full = trl_log_probs(model, batch)
    with accelerator("bf16") as prepared:
        Scorer(model, cast_lm_head_to_fp32=cast)  # adds the head, as TRL does before it prepares the model
        model = prepared.prepare_model(model, evaluation_mode=True)
        scorer = trusted(model, cast_lm_head_to_fp32=cast)
        packed, exact = scorer.log_probs(batch), Scorer(model).log_probs(batch)
    assert packed.dtype == torch.float32
    scored = batch.labels[:, 1:] != -100
    assert 0 < (exact - full).abs()[scored].mean() < 0.1  # it does run in bfloat16
    assert 0 < (packed - full).abs()[scored].mean() <= 1.5 * (exact - full).abs()[scored].mean()
    assert disagreement(packed[scored], exact[scored], torch.bfloat16) is None
    assert scorer.stats.fallback is None


@pytest.mark.parametrize("api", ["legacy", "torch 2.9"])
def test_reduced_float32_is_held_to_the_tolerance_of_half_precision(monkeypatch, api):
    monkeypatch.setattr(
        "trl_refplug.scoring.verification.exact_log_probs", lambda *args: exact_log_probs(*args) + 1e-3
    )
    matmul = torch.backends.mkldnn.matmul
    before = torch.get_float32_matmul_precision(), matmul.fp32_precision
    try:
        if api == "legacy":
            torch.set_float32_matmul_precision("high")
        else:
            matmul.fp32_precision = "tf32"
        assert trusted(tiny("llama")).stats.fallback is None
    finally:
        matmul.fp32_precision = before[1]
        torch.set_float32_matmul_precision(before[0])
    with pytest.warns(ExactFallbackWarning, match="differ"):
        Scorer(tiny("llama"), mode="packed").log_probs(random_batch())


def test_a_float32_head_is_more_precise_than_a_bfloat16_one():
    batch = random_batch(groups=4, size=4)
    model = tiny("phi").bfloat16()
    with torch.no_grad():
        model.lm_head.bias += 30  # does not change the distribution, but how much rounding the logits costs
    exact = trl_log_probs(model, batch, cast=True)
    scored = batch.labels[:, 1:] != -100
    packed = trusted(copy.deepcopy(model), cast_lm_head_to_fp32=True).log_probs(batch)
    half = trusted(model).log_probs(batch)
    assert 2 * (packed - exact)[scored].abs().mean() < (half - exact)[scored].abs().mean()


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routed_experts_stay_within_tolerance(kind, dtype):
    """Where two experts have nearly the same score, a token may go to either, depending on the batch."""
    batch = random_batch(groups=4, size=4)
    model = tiny(kind).to(dtype)
    scored = batch.labels[:, 1:] != -100
    found, expected = trusted(model).log_probs(batch)[scored], trl_log_probs(model, batch)[scored]
    assert disagreement(found, expected, dtype) is None
    assert (found - expected).abs().median() <= 16 * torch.finfo(dtype).eps
