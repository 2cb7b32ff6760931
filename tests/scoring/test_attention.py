"""Attention along a tree is compared with a softmax over the tokens that each token sees."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.scoring.models import tiny
from tests.scoring.test_head import Sizes
from trl_refplug.rows import Row
from trl_refplug.scoring import attention
from trl_refplug.scoring.attention import TreeAttention, tree_attention
from trl_refplug.scoring.layout import plan
from trl_refplug.scoring.operations import Operations


MODEL = tiny("llama")


def pack_of(sequences):
    """All sequences in one pack, in which every common prefix of at least two tokens is shared."""
    [pack] = plan([Row.completion(tokens, [0]) for tokens in sequences], None, Operations(1.0, 0.1, 0.0))
    return pack


def random_pack(seed, rows, longest):
    """Rows that branch off each other anywhere."""
    rng = np.random.default_rng(seed)
    sequences = [rng.integers(3, 9, longest)]
    for _ in range(rows - 1):
        stem = sequences[rng.integers(len(sequences))]
        shared = rng.integers(len(stem))
        sequences.append(np.concatenate([stem[:shared], rng.integers(9, 99, rng.integers(1, longest))]))
    return pack_of(sequences)


def seen_in(pack):
    """Bool `[tokens, tokens]`: for each query, which keys it sees."""
    seen = torch.zeros(len(pack.tokens), len(pack.tokens), dtype=torch.bool)
    for node in pack.nodes:
        seen[node.start : node.end, node.start : node.stop] = True
    return seen.tril_()


def operands(pack, dtype, heads=4, key_heads=2, dim=8, value_dim=8):
    generator = torch.Generator().manual_seed(0)
    sizes = [(heads, dim), (key_heads, dim), (key_heads, value_dim)]
    return [torch.randn(1, count, len(pack.tokens), size, generator=generator).to(dtype) for count, size in sizes]


def attended(pack, query, key, value, **options):
    with tree_attention(MODEL, pack):
        output, _ = ALL_ATTENTION_FUNCTIONS[attention.NAME](torch.nn.Module(), query, key, value, None, **options)
    return output


def expected(pack, query, key, value, softcap=None):
    """What attention has to give, computed in float64 with a mask of all pairs: `[1, tokens, heads, dim]`."""
    groups = query.shape[1] // key.shape[1]
    query, key, value = query.double(), key.double().repeat_interleave(groups, 1), value.double()
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen_in(pack), -torch.inf).softmax(-1)
    return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2)


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 999),
    rows=st.integers(1, 8),
    longest=st.integers(2, 20),
    key_heads=st.sampled_from([1, 2, 4]),
    value_dim=st.sampled_from([8, 5]),
    softcap=st.sampled_from([None, 2.0]),
    scores=st.sampled_from([1, 200, attention.SCORES]),
)
def test_a_token_attends_to_its_own_row_only(seed, rows, longest, key_heads, value_dim, softcap, scores):
    pack = random_pack(seed, rows, longest)
    values = operands(pack, torch.float32, key_heads=key_heads, value_dim=value_dim)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "SCORES", scores)
        found = attended(pack, *values, softcap=softcap)
    torch.testing.assert_close(found.double(), expected(pack, *values, softcap), rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}], ids=["fused", "explicit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_rounding_does_not_add_up_over_ancestors(dtype, options):
    trunk = list(range(3, 243))
    deep = pack_of([[*trunk[:length], 300 + length] for length in range(2, 240, 2)])
    flat = pack_of([trunk])
    assert len(flat.nodes) == 1
    assert len(deep.nodes) > 200

    def error(pack):  # of tokens that have many ancestors
        values = operands(pack, dtype, heads=16)
        differences = attended(pack, *values, **options).double() - expected(pack, *values, **options)
        return differences[0, pack.positions > 200].abs().mean()

    assert error(deep) < 1.15 * error(flat)


@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"value_dim": 5}], ids=str)
def test_scores_are_held_for_some_queries_at_a_time(monkeypatch, options):
    pack = random_pack(0, 4, 100)
    values = operands(pack, torch.float32, value_dim=options.pop("value_dim", 8))
    with Sizes() as all_at_once:
        attended(pack, *values, **options)
    monkeypatch.setattr(attention, "SCORES", 4 * 100 * 10)
    with Sizes() as some_at_once:
        attended(pack, *values, **options)
    assert max(shape.numel() for shape in all_at_once.made) >= 4 * 100 * 100
    assert max(shape.numel() for shape in some_at_once.made) <= 4 * len(pack.tokens) * 10


two_rows = st.integers(253, 258).map(lambda length: pack_of([[99] * length, [*range(3, 50)]]))  # 256: two whole blocks
packs = st.builds(random_pack, st.integers(0, 999), st.integers(1, 8), st.integers(2, 500))


@settings(deadline=None, max_examples=40)
@given(pack=two_rows | packs)
def test_the_blocks_that_flex_attention_computes(pack):
    seen, tokens, device = seen_in(pack), len(pack.tokens), torch.device("cpu")
    expected = create_block_mask(
        lambda batch, head, query, key: seen[query, key], None, None, tokens, tokens, device=str(device)
    )
    found = TreeAttention(pack).block_mask(device)
    assert found.seq_lengths == (tokens, tokens)
    assert found.BLOCK_SIZE == expected.BLOCK_SIZE
    for name in ("kv_num_blocks", "full_kv_num_blocks", "kv_indices", "full_kv_indices"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    queries, keys = torch.arange(tokens)[:, None], torch.arange(tokens)
    assert torch.equal(found.mask_mod(0, 0, queries, keys), seen)


def test_the_blocks_are_known_without_a_mask_of_all_pairs():
    pack = random_pack(0, 4, 2000)
    with Sizes() as sizes:
        TreeAttention(pack).block_mask(torch.device("cpu"))
    assert max(shape.numel() for shape in sizes.made) <= len(pack.tokens)


def test_layers_may_be_on_several_devices():
    tree = TreeAttention(random_pack(0, 4, 20))
    masks = {kind: tree.block_mask(torch.device(kind)) for kind in ("cpu", "meta")}
    for kind, mask in masks.items():
        assert mask.kv_indices.device.type == kind
        assert tree.block_mask(torch.device(kind)) is mask
