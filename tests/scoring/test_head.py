"""The tiled LM head gives the log-probs of the model's own logits, and never holds more than a tile of logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.scoring.models import ARCHITECTURES, VOCAB, random_batch, tiny
from tests.scoring.test_scorer import TOLERANCE, trl_log_probs, trusted
from trl_refplug.scoring import head as head_module
from trl_refplug.scoring.head import Head


SCALED = {
    "hyperclovax": {"num_key_value_heads": 2, "logits_scaling": 3.0},  # multiplies where granite divides
    "falcon_h1": {
        "num_key_value_heads": 2,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "lm_head_multiplier": 0.3,
    },
}


@pytest.fixture
def small_tiles(monkeypatch):
    """Make tiles so small that there are several in each direction, the last of which is smaller still."""
    monkeypatch.setattr(head_module, "TILE_ROWS", 3)
    monkeypatch.setattr(head_module, "TILE_COLUMNS", 7)


class Sizes(TorchDispatchMode):
    """Records the shape of every tensor that is made, unless it is a view of a known one."""

    def __init__(self, *known):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.made.append(tensor.shape)
        return result


@pytest.mark.parametrize("kind", [*ARCHITECTURES, *SCALED])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_head_in_tiles_gives_the_models_own_log_probs(small_tiles, kind, temperature):
    model = tiny(kind, **SCALED.get(kind, {}))
    tokens = torch.randint(3, VOCAB, (1, VOCAB), generator=torch.Generator().manual_seed(0))
    targets = torch.arange(VOCAB)  # includes the first and the last token of every tile
    lm_head = model.get_output_embeddings()
    with torch.no_grad():
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0]
        logits = model(input_ids=tokens, use_cache=False).logits[0].double()
        head = Head.from_model(model, temperature=temperature, float32=False)
        found = head.log_probs(hidden, targets, lm_head.weight, getattr(lm_head, "bias", None))
    expected = (logits / temperature).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    assert found.dtype == torch.float32
    assert expected.std() > 0.1
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=TOLERANCE)


def test_a_scale_under_another_name():
    """Muse Glimmer calls its scale `output_multiplier`, and applies it before the soft cap."""
    model = tiny("gemma2", final_logit_softcapping=2.0)
    model.config.output_multiplier = 0.3
    head = Head.from_model(model, temperature=1.0, float32=False)
    hidden, weight = torch.randn(5, 32), torch.randn(VOCAB, 32)
    expected = (2 * torch.tanh(0.3 * (hidden @ weight.t()) / 2)).log_softmax(-1)[:, 4]
    found = head.log_probs(hidden, torch.full((5,), 4), weight, None)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@settings(deadline=None, max_examples=50)
@given(
    rows=st.integers(1, 10),
    vocab=st.integers(1, 24),
    tile=st.tuples(st.integers(1, 11), st.integers(1, 25)),
    spread=st.sampled_from([1.0, 300.0]),
    seed=st.integers(0, 99),
)
def test_tiles_of_any_size(rows, vocab, tile, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 4, generator=generator, dtype=torch.float64) * spread  # so far apart that exp overflows
    weight, bias = (
        torch.randn(vocab, 4, generator=generator).double(),
        torch.randn(vocab, generator=generator).double(),
    )
    targets = torch.randint(vocab, (rows,), generator=generator)
    head = Head(scale=1.0, softcap=None, temperature=1.0, float32=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_module, "TILE_ROWS", tile[0])
        patch.setattr(head_module, "TILE_COLUMNS", tile[1])
        found = head.log_probs(hidden, targets, weight, bias)
    expected = (hidden @ weight.t() + bias).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(found, expected)


def test_no_more_than_a_tile_of_logits_is_ever_held(small_tiles):
    rows, vocab, width = 20, 50, 4
    hidden, weight, bias = torch.randn(rows, width), torch.randn(vocab, width), torch.randn(vocab)
    head = Head(scale=2.0, softcap=3.0, temperature=0.7, float32=False)
    with Sizes() as sizes:
        head.log_probs(hidden, torch.zeros(rows, dtype=torch.int64), weight, bias)
    tiles = [shape for shape in sizes.made if shape.numel() == 3 * 7]
    assert len(tiles) > (rows // 3) * (vocab // 7)
    # No tensor may be larger than the hidden states. One row of tiles, or one column, would be larger
    assert max(shape.numel() for shape in sizes.made) <= rows * width < min(3 * vocab, rows * 7)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi"])
def test_packed_scoring_never_holds_logits_of_all_the_vocabulary(small_tiles, kind):
    model, batch = tiny(kind), random_batch()
    scorer = trusted(model)
    with Sizes(*model.parameters()) as sizes:
        found = scorer.log_probs(batch)
    assert [shape for shape in sizes.made if VOCAB in shape and shape.numel()] == []
    torch.testing.assert_close(found, trl_log_probs(model, batch), rtol=0, atol=TOLERANCE)
