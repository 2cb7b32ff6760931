"""Models and batches that packing would get wrong are recognized, and scored exactly, with a warning that says why."""

import re
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import BartConfig, BartForConditionalGeneration, MistralConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaModel

from tests.scoring.models import VOCAB, batch_of, random_batch, tiny, with_images
from tests.scoring.test_scorer import TOLERANCE, trl_log_probs
from trl_refplug.errors import UnsupportedInputError
from trl_refplug.rows import PaddedRows, Row
from trl_refplug.scoring import ExactFallbackWarning, Scorer
from trl_refplug.scoring.packable import length_limit


SLIDING = {"sliding_window": 8}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}

LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
LINEAR |= {"num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2}
LINEAR |= {"layer_types": ["linear_attention", "full_attention"]}

UNSAFE = {
    "mistral": (SLIDING, "sliding window of 8"),
    "gemma2": (SLIDING, "sliding window of 8"),
    "bloom": ({"n_layer": 2, "n_head": 4}, "ALiBi"),
    "falcon": ({"alibi": True}, "ALiBi"),
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 2}, "ALiBi"),
    "mamba": ({"state_size": 4}, "recurrent"),
    "recurrent_gemma": ({"num_key_value_heads": 2}, "recurrent"),
    "lfm2": (
        {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
        "recurrent or hybrid layers (conv)",
    ),
    "qwen3_next": (LINEAR, "recurrent or hybrid layers (linear_attention)"),
    "falcon_h1": (
        {"num_key_value_heads": 2, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
        "recurrent",
    ),
    "xglm": ({"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48}, "attention interface"),
    "llama": ({**DYNAMIC, "max_position_embeddings": 8}, "rotary embeddings that change"),
}


def stream(scorer, batch):
    """Score the rows of a batch as a stream, without padding, and put the answers back into the shape of the batch."""
    padded = PaddedRows.from_batch(batch)
    answers = dict(scorer.score_rows(padded.rows))
    return padded.to_log_probs([answers[index].numpy() for index in range(len(padded))])


@pytest.mark.parametrize("kind", UNSAFE)
@pytest.mark.parametrize("streamed", [False, True])
def test_unsafe_models_are_scored_exactly(kind, streamed):
    options, reason = UNSAFE[kind]
    model, batch = tiny(kind, **options), random_batch()
    expected = trl_log_probs(model, batch)
    scorer = Scorer(model, mode="packed")
    with pytest.warns(ExactFallbackWarning, match=re.escape(reason)):
        found = stream(scorer, batch) if streamed else scorer.log_probs(batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE if streamed else 0)
    assert reason in scorer.stats.fallback
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scorer.log_probs(batch)  # which is an error if it warns once more


def test_a_sliding_window_longer_than_the_rows_is_packed():
    model, batch = tiny("mistral", sliding_window=64), random_batch()
    scorer = Scorer(model, mode="packed")
    torch.testing.assert_close(scorer.log_probs(batch), trl_log_probs(model, batch), rtol=0, atol=TOLERANCE)
    assert scorer.stats.fallback is None


@pytest.mark.parametrize("length", [15, 16, 17, 18])
def test_rows_about_as_long_as_a_sliding_window(length):
    model = tiny("mistral", sliding_window=16)
    prompt = list(range(5, 5 + length - 3))
    batch = batch_of([prompt, prompt], [[7, 8, 9], [9, 8, 7]])
    scorer = Scorer(model, mode="packed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExactFallbackWarning)
        found = scorer.log_probs(batch)
    torch.testing.assert_close(found, trl_log_probs(model, batch), rtol=0, atol=TOLERANCE)
    assert (scorer.stats.fallback is None) == (length <= 16)


def test_the_shortest_window_of_layers_that_differ():
    windows = {layer: {"sliding_window": window} for layer, window in enumerate((32, 16))}
    config = MistralConfig(num_hidden_layers=2, per_layer_config=windows)
    assert length_limit(SimpleNamespace(config=config)) == (16, "rows longer than the sliding window of 16 tokens")


def test_of_a_stream_only_the_rows_that_are_too_long_are_scored_exactly():
    model = tiny("mistral", sliding_window=16)
    rows = [Row.completion(list(range(5, 5 + length)), [7, 8, 9]) for length in (4, 30, 5, 30, 6)]
    scorer = Scorer(model, mode="packed")
    with pytest.warns(ExactFallbackWarning, match="sliding window of 16"):
        answers = dict(scorer.score_rows(rows))
    assert sorted(answers) == list(range(5))
    assert scorer.stats.operations > 0
    exact = dict(Scorer(model).score_rows(rows))
    for index, answer in answers.items():
        torch.testing.assert_close(answer, exact[index], rtol=0, atol=TOLERANCE)


def test_left_padding_of_queries_scaled_by_position_is_scored_exactly():
    scaled = {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
    scaled |= {"llama_4_scaling_beta": 0.5, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    model = tiny("ministral3", num_key_value_heads=2, head_dim=8, rope_parameters=scaled, max_position_embeddings=64)
    right, left = random_batch(), random_batch(side="left")
    scorer = Scorer(model, mode="packed")
    torch.testing.assert_close(scorer.log_probs(right), trl_log_probs(model, right), rtol=0, atol=TOLERANCE)
    assert scorer.stats.fallback is None
    with pytest.warns(ExactFallbackWarning, match="absolute positions"):
        assert torch.equal(scorer.log_probs(left), trl_log_probs(model, left))


class Placed(LlamaModel):
    """Has absolute positions, although its configuration does not say so."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, inputs_embeds=None, **kwargs):
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        embeddings = self.embed_tokens(input_ids) + 0.01 * position_ids[..., None]
        return super().forward(
            inputs_embeds=embeddings, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        )


def test_left_padding_that_turns_out_to_count_is_scored_exactly():
    model, batch = tiny("llama"), random_batch(side="left")
    model.model.__class__ = Placed
    scorer = Scorer(model, mode="packed")
    for right in (random_batch(), random_batch(seed=1)):
        torch.testing.assert_close(scorer.log_probs(right), trl_log_probs(model, right), rtol=0, atol=TOLERANCE)
    assert scorer.stats.fallback is None
    with pytest.warns(ExactFallbackWarning, match="absolute positions"):
        assert torch.equal(scorer.log_probs(batch), trl_log_probs(model, batch))


def test_left_padding_of_absolute_positions_is_scored_exactly():
    model, batch = tiny("gpt2"), random_batch(side="left")
    scorer = Scorer(model, mode="packed")
    scorer.log_probs(random_batch())
    with pytest.warns(ExactFallbackWarning, match="absolute positions"):
        assert torch.equal(scorer.log_probs(batch), trl_log_probs(model, batch))
    assert scorer.log_probs(random_batch()).shape  # and packing goes on where it is safe


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"extras": {"token_type_ids": torch.zeros(6, 26, dtype=torch.int64)}}, "token_type_ids"),
        ({"rows_sliceable": False}, "not by row"),
    ],
)
def test_batches_with_further_inputs_are_scored_exactly(change, reason):
    model, batch = tiny("llama"), random_batch()
    scorer = Scorer(model, mode="packed")
    with pytest.warns(ExactFallbackWarning, match=reason):
        scorer.log_probs(replace(batch, **change))


def test_a_mask_with_holes_is_scored_exactly():
    model, batch = tiny("llama"), random_batch()
    batch.attention_mask[0, 3] = 0
    scorer = Scorer(model, mode="packed")
    with pytest.warns(ExactFallbackWarning, match="holes"):
        assert torch.equal(scorer.log_probs(batch), trl_log_probs(model, batch))


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_are_scored_exactly(config):
    policy = tiny("llama")
    batch = random_batch()
    Scorer(policy)  # adds the head, as TRL does before it wraps the model
    model = get_peft_model(policy, config(task_type="CAUSAL_LM", num_virtual_tokens=4))
    scorer = Scorer(model, mode="packed")
    with pytest.warns(ExactFallbackWarning, match="virtual tokens"):
        found = scorer.log_probs(batch)
    assert found.shape == (len(batch.input_ids), batch.input_ids.shape[1] - 1)
    assert (found[batch.labels[:, 1:] == -100] == 0).all()
    assert (found[batch.labels[:, 1:] != -100] < 0).all()


class LeakyLayer(LlamaDecoderLayer):
    """Mixes each token with the one before it in the input, outside of attention. No configuration tells."""

    def forward(self, hidden_states, *args, **kwargs):
        mixed = hidden_states + 0.1 * torch.nn.functional.pad(hidden_states, (0, 0, 1, -1))
        return super().forward(mixed, *args, **kwargs)


class ReadsItsPrompt(LlamaDecoderLayer):
    """Lets the first tokens of its input see each other both ways, as a prefix language model does."""

    def forward(self, hidden_states, *args, **kwargs):
        prompt = hidden_states[:, :8]
        read = torch.cat([prompt + 0.3 * prompt.mean(1, keepdim=True), hidden_states[:, 8:]], 1)
        return super().forward(read, *args, **kwargs)


class Dropping(LlamaMLP):
    """Like an expert of limited capacity: it only takes the first half of a batch's tokens."""

    def forward(self, hidden_states):
        tokens = hidden_states.shape[0] * hidden_states.shape[1]
        taken = (torch.arange(tokens) < tokens // 2).view(*hidden_states.shape[:2], 1)
        return super().forward(hidden_states) * taken


def leaky(model):
    model.model.layers[0].__class__ = LeakyLayer


def reads_its_prompt(model):
    model.model.layers[1].__class__ = ReadsItsPrompt


def dropping(model):
    model.model.layers[1].mlp.__class__ = Dropping


@pytest.mark.parametrize("spoil", [leaky, reads_its_prompt, dropping])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_model_that_disagrees_is_not_trusted(streamed, spoil):
    model, batch = tiny("llama"), random_batch()
    spoil(model)
    scorer = Scorer(model, mode="packed")
    with pytest.warns(ExactFallbackWarning, match="differ from the exact call's"):
        found = stream(scorer, batch) if streamed else scorer.log_probs(batch)
    if spoil is not dropping or not streamed:  # what it drops depends on how rows are put together
        torch.testing.assert_close(found, trl_log_probs(model, batch), rtol=0, atol=TOLERANCE if streamed else 0)
    assert torch.equal(scorer.log_probs(batch), trl_log_probs(model, batch))


def test_a_model_that_cannot_take_the_packed_input_is_not_trusted():
    model, batch = tiny("llama"), random_batch()
    inner = model.model.forward

    def forward(input_ids, attention_mask, **kwargs):
        if attention_mask is None:
            raise ValueError("needs a mask")
        return inner(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    model.model.forward = forward
    scorer = Scorer(model, mode="packed")
    with pytest.warns(ExactFallbackWarning, match="ValueError: needs a mask"):
        assert torch.equal(scorer.log_probs(batch), trl_log_probs(tiny("llama"), batch))
    assert model.config._attn_implementation != "refplug_tree"


class ScarceMemory(LlamaDecoderLayer):
    """Runs out of memory with more than 60 tokens."""

    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    def forward(self, hidden_states, *args, **kwargs):
        if hidden_states.shape[0] * hidden_states.shape[1] > 60:
            raise self.error
        return super().forward(hidden_states, *args, **kwargs)


@pytest.mark.parametrize(
    "error",
    [
        ScarceMemory.error,
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", ["exact", "packed"])
def test_out_of_memory_halves_the_budget_and_loses_nothing(mode, error, monkeypatch):
    monkeypatch.setattr(ScarceMemory, "error", error)
    model = tiny("llama")
    rows = [Row.completion(list(range(5, 15)), [20 + index] * (3 + index % 5)) for index in range(24)]
    expected = dict(Scorer(model).score_rows(rows))
    scorer = Scorer(model, mode=mode, token_budget=200)
    model.model.layers[1].__class__ = ScarceMemory
    answers = [answer for answers in scorer.score_passes(rows) for answer in answers]
    assert sorted(index for index, _ in answers) == list(range(24))
    assert 25 <= scorer._packed.budget <= 100  # halved until a pass fits, and not further
    for index, answer in answers:
        torch.testing.assert_close(answer, expected[index], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("mode", ["exact", "packed"])
def test_one_row_that_does_not_fit_is_an_error(mode):
    model = tiny("llama")
    scorer = Scorer(model, mode=mode)
    list(scorer.score_rows([Row.completion([5], [6])]))
    model.model.layers[1].__class__ = ScarceMemory
    with pytest.raises(torch.OutOfMemoryError):
        list(scorer.score_rows([Row.completion([5] * 70, [6])] * 2))


def test_an_adapter_is_scored_as_it_is():
    batch = random_batch()
    policy = tiny("llama")
    base = trl_log_probs(policy, batch)
    model = get_peft_model(policy, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    packed, exact = Scorer(model, mode="packed"), Scorer(model)
    adapted = packed.log_probs(batch)
    torch.testing.assert_close(adapted, exact.log_probs(batch), rtol=0, atol=TOLERANCE)
    assert (adapted - base).abs().max() > 0.01
    with model.disable_adapter():
        torch.testing.assert_close(packed.log_probs(batch), base, rtol=0, atol=TOLERANCE)
    assert packed.stats.fallback is None


def test_an_activated_adapter_is_scored_exactly():
    """An aLoRA begins at the last place of its invocation tokens in the input, so in a pack only in the last row."""
    batch = random_batch()
    activated = batch.input_ids[0, 6:8].tolist()
    policy = tiny("llama")
    Scorer(policy)
    scorer = Scorer(policy, mode="packed")
    scorer.log_probs(batch)  # trusted, before there is an adapter
    assert scorer.stats.fallback is None
    config = LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=activated, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(policy, config)
    scorers = [scorer, Scorer(model, mode="packed")]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # these are zero after initialization, so that the adapter would change nothing
            torch.nn.init.normal_(parameter)
    for each in scorers:
        with pytest.warns(ExactFallbackWarning, match="aLoRA"):
            found = each.log_probs(batch)
    assert torch.equal(found, Scorer(model).log_probs(batch))


class Windowed(LlamaAttention):
    """Has a sliding window that its configuration does not tell."""

    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states, sliding_window=60, **kwargs)


class FailsLater(LlamaDecoderLayer):
    """Fails for long inputs, like a kernel that cannot be compiled for a shape that comes late."""

    def forward(self, hidden_states, *args, **kwargs):
        if self.self_attn.config._attn_implementation == "refplug_tree" and hidden_states.shape[1] > 70:
            raise ValueError("out of resources: shared memory")
        return super().forward(hidden_states, *args, **kwargs)


def windowed(model):
    model.model.layers[1].self_attn.__class__ = Windowed


def fails_later(model):
    model.model.layers[1].__class__ = FailsLater


@pytest.mark.parametrize(
    ("spoil", "reason"), [(windowed, "sliding window of 60"), (fails_later, "ValueError: out of resources")]
)
@pytest.mark.parametrize("streamed", [False, True])
def test_what_fails_after_trust_was_earned_is_scored_exactly(spoil, reason, streamed):
    model = tiny("llama")
    spoil(model)
    short, long = random_batch(groups=1), batch_of([[5] * 80, [6] * 10, [7] * 90], [[8, 9]] * 3)
    expected = trl_log_probs(model, short), trl_log_probs(model, long)
    scorer = Scorer(model, mode="packed", token_budget=70)
    torch.testing.assert_close(scorer.log_probs(short), expected[0], rtol=0, atol=TOLERANCE)
    assert scorer.stats.fallback is None
    with pytest.warns(ExactFallbackWarning, match=reason):
        found = stream(scorer, long) if streamed else scorer.log_probs(long)
    torch.testing.assert_close(found, expected[1], rtol=0, atol=TOLERANCE if streamed else 0)
    assert torch.equal(scorer.log_probs(short), expected[0])  # for good


def test_no_row_of_a_stream_is_scored_twice_when_a_later_pass_fails():
    model = tiny("llama")
    fails_later(model)
    rows = [Row.completion([5 + index] * length, [8, 9]) for index, length in enumerate((10, 60, 80, 20, 90))]
    expected = dict(Scorer(model).score_rows(rows))
    scorer = Scorer(model, mode="packed", token_budget=64)
    with pytest.warns(ExactFallbackWarning, match="out of resources"):
        passes = list(scorer.score_passes(rows))
    answers = [answer for answers in passes for answer in answers]
    assert sorted(index for index, _ in answers) == list(range(5))
    for index, answer in answers:
        torch.testing.assert_close(answer, expected[index], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("label", [-1, VOCAB])
def test_labels_that_are_no_token_ids_are_refused(label):
    model, batch = tiny("llama"), random_batch()
    batch.labels[1, -1] = label
    scorer = Scorer(model, mode="packed")
    refused = f"label {label}, expected a token id below {VOCAB}|Found token id {label}, .* knows {VOCAB} tokens only"
    with pytest.raises(UnsupportedInputError, match=refused):
        scorer.log_probs(batch)
    for mode in ("exact", "packed"):
        with pytest.raises(UnsupportedInputError, match=refused):
            list(Scorer(model, mode=mode).score_rows([Row([5, 6, 7], [-100, 6, label])]))


def encoder_decoder():
    sides = {"layers": 1, "attention_heads": 2, "ffn_dim": 16}
    options = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sides.items()}
    return BartForConditionalGeneration(BartConfig(vocab_size=VOCAB, d_model=16, **options)).eval()


class Prefixed(LlamaModel):
    """Runs its backbone twice in one forward pass, the first time on other tokens."""

    def forward(self, input_ids, **kwargs):
        super().forward(input_ids[:, :1])
        return super().forward(input_ids, **kwargs)


def prefixed():
    model = tiny("llama")
    model.model.__class__ = Prefixed
    return model


class PrefixLM(LlamaModel):
    """Adds a mask with which all tokens of the prompt see each other."""

    def forward(self, input_ids, attention_mask=None, **kwargs):
        seen = torch.ones(input_ids.shape[1], input_ids.shape[1], dtype=torch.bool).tril()
        seen[:8, :8] = True
        return super().forward(input_ids, attention_mask=seen.expand(len(input_ids), 1, -1, -1), **kwargs)


def prefix_lm():
    model = tiny("llama")
    model.model.__class__ = PrefixLM
    return model


def reads_both_ways():
    vision = {"model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 16, "projection_dim": 32}
    vision |= {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    return with_images("paligemma", {"model_type": "gemma"}, vision, projection_dim=32, image_token_index=VOCAB - 1)


LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
LONG_ROPE = {"rope_parameters": LONG, "original_max_position_embeddings": 8}

REFUSED = {
    "an encoder-decoder": (encoder_decoder, "encoder-decoder"),
    "experts of limited capacity": (lambda: tiny("mixtral", expert_capacity=4), "limited capacity"),
    "bidirectional attention": (
        lambda: tiny("gemma3_text", use_bidirectional_attention=True),
        "configured not to be causal",
    ),
    "declared not to be causal": (lambda: tiny("llama", is_causal=False), "configured not"),
    "chunked attention": (lambda: tiny("llama", attention_chunk_size=8), "attention chunk of 8"),
    "temperatures by position": (lambda: tiny("llama", attn_temperature_tuning=4), "attention temperatures"),
    "attention sinks": (lambda: tiny("gpt_oss", num_key_value_heads=2, head_dim=8), "option 's_aux'"),
    "a mask of its own": (lambda: tiny("doge", num_key_value_heads=2), "mask of its own"),
    "another way through the model": (lambda: tiny("opt", ffn_dim=48, word_embed_proj_dim=32), "ran 0 times"),
    "two attentions in a layer": (lambda: tiny("diffllama", num_key_value_heads=2), "attention interface"),
    "rotary embeddings by length": (lambda: tiny("phi3", **LONG_ROPE), "longer than 8 tokens"),
    "tokens of its own": (prefixed, "attention over other tokens"),
    "a prompt that is read both ways": (prefix_lm, "mask of its own"),
    "a prefix language model": (reads_both_ways, "configured not to be causal"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_known_risks_are_refused_for_what_they_are(what):
    make, reason = REFUSED[what]
    model, batch = make(), random_batch()
    expected = Scorer(model).log_probs(batch)
    with pytest.warns(ExactFallbackWarning, match=reason):
        assert torch.equal(Scorer(model, mode="packed").log_probs(batch), expected)
