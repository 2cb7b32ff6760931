"""
Counted operations are compared with torch's own counter and with counts by hand. Planning and every efficiency that is
reported depend on them.
"""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from tests.scoring.models import ARCHITECTURES, VOCAB, tiny
from trl_refplug.rows import Row
from trl_refplug.scoring.layout import plan
from trl_refplug.scoring.operations import Operations, count_operations, layer_configs


ROUTED = ("mixtral", "qwen3_moe")


@pytest.mark.parametrize("kind", [kind for kind in ARCHITECTURES if kind not in ROUTED])
@pytest.mark.parametrize("tokens", [1, 40])
def test_it_counts_what_torch_counts(kind, tokens):
    model = tiny(kind, attn_implementation="eager")
    cost = count_operations(model)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.full((1, tokens), 5), use_cache=False)
    # Eager attention also computes the pairs that it masks. torch counts the rotary angles as a matrix product, which
    # the tolerance allows for
    expected = tokens * (cost.token + tokens * cost.pair + cost.head)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-3)


def test_of_routed_experts_the_active_ones_count():
    attention = 2 * 32 * 32 + 2 * 32 * 16  # query and output, key and value of half as many heads
    router, expert = 4 * 32, 3 * 32 * 48
    assert count_operations(tiny("mixtral")).token == 2 * 2 * (attention + router + 2 * expert)


def test_of_a_vision_language_model_the_text_side_counts():
    text = tiny("llama")
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    whole = LlavaForConditionalGeneration(LlavaConfig(text_config=text.config, vision_config=vision))
    assert count_operations(whole) == count_operations(text)


def test_a_configuration_may_call_its_layers_otherwise():
    for names in ({"n_layer": 3}, {"num_hidden_layers": 3}, {"n_layer": 3, "is_heterogeneous": False}):
        config = SimpleNamespace(**names)
        assert layer_configs(config) == [config] * 3
    assert len(layer_configs(SimpleNamespace(num_transformer_layers=3))) == 1


GEMMA_3N = {"num_key_value_heads": 2, "head_dim": 8, "num_kv_shared_layers": 0}


@pytest.mark.parametrize(
    ("kind", "table", "options"),
    [
        ("llama", "vocab_size", {}),
        ("gpt2", "n_positions", {}),
        ("gemma3n_text", "vocab_size_per_layer_input", GEMMA_3N),
    ],
)
def test_looking_up_in_a_table_is_free(kind, table, options):
    small, large = (count_operations(tiny(kind, **options, **{table: size})) for size in (VOCAB, 99))
    assert small.token == large.token


def test_the_tokens_of_a_span_attend_to_all_before():
    cost = Operations(token=1000.0, pair=1.0, head=0.0)
    assert cost.span(3, 7) == 4 * 1000 + (4 + 5 + 6 + 7)
    assert cost.span(0, 3) + cost.span(3, 7) == cost.span(0, 7)
    assert cost.span(7, 7) == 0


def test_a_pack_costs_the_spans_of_its_nodes():
    cost = Operations(token=7.0, pair=3.0, head=11.0)
    prompt = list(range(3, 33))
    rows = [Row.completion(prompt, [40, 41, 42]), Row.completion(prompt, [43, 44])]
    [pack] = plan(rows, None, cost)
    assert pack.operations(cost) == cost.span(0, 30) + cost.span(30, 32) + cost.span(30, 31) + 5 * cost.head


@pytest.mark.parametrize(("pair", "tokens"), [(0.0, 400 + 4 * 2), (0.01, 400 + 2 * 1 + 4 * 1)])
def test_one_more_token_is_worth_sharing_if_it_attends_to_many(pair, tokens):
    """Two pairs of rows. All start with the same 400 tokens, and each pair shares one more."""
    stem = list(range(400))
    rows = [Row.completion([*stem, 500 + index // 2], [600 + index, 7]) for index in range(4)]
    [pack] = plan(rows, None, Operations(token=1.0, pair=pair, head=1.0))
    assert len(pack.tokens) == tokens
