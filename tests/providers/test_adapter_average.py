"""The moving average of LoRA adapters is the average of the weights they make, and needs no dense matrix."""

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model

from trl_refplug import ConfigurationError
from trl_refplug.models.adapters import REFERENCE_ADAPTER, adapter_parameters, reference_active
from trl_refplug.providers.ema.adapter_average import AdapterAverage
from trl_refplug.providers.ema.provider import EmaOptions
from trl_refplug.providers.ema.tensor_files import TensorReader

from .. import tiny
from ..trainers.test_memory import peak_bytes


ALPHAS = [1.0, 0.6, 0.1, 0.01, 0.001]
WIDE = dict(hidden_size=128, intermediate_size=160, num_hidden_layers=1)


def lora(**overrides):
    return LoraConfig(**{"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **overrides})


def adapted(config=None, architecture="llama", dtype=torch.float32, **overrides):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(
            tiny.model(architecture, **overrides).to(dtype), config or lora(), autocast_adapter_dtype=False
        )
    return model.eval()


def averaged(policy, **options):
    return AdapterAverage(lambda: policy, EmaOptions(**options), torch.float32)


class Training:
    """Lets the weights of the policy's adapter drift, with some noise, as training does."""

    def __init__(self, policy, drift=0.02, noise=0.002):
        self.generator = torch.Generator().manual_seed(0)
        self.parameters = adapter_parameters(policy, "default")
        self.drift = {name: self.random(p) * drift for name, p in self.parameters.items()}
        self.noise = noise

    def random(self, parameter):
        return torch.randn(parameter.shape, generator=self.generator)

    @torch.no_grad()
    def step(self):
        for name, p in self.parameters.items():
            moved = p.float() + self.drift[name] + self.random(p) * self.noise
            p.copy_(moved.to(p.dtype))


def layers(policy, adapter):
    return {name: m for name, m in policy.named_modules() if adapter in getattr(m, "r", {})}


def deltas(policy, adapter="default"):
    """Return what an adapter adds to every weight, in float64."""
    found = {}
    for name, layer in layers(policy, adapter).items():
        if adapter in layer.lora_embedding_A:
            left, right = layer.lora_embedding_B[adapter], layer.lora_embedding_A[adapter]
        else:
            left, right = layer.lora_B[adapter].weight, layer.lora_A[adapter].weight
        found[name] = layer.scaling[adapter] * left.detach().double() @ right.detach().double()
    return found


def effective(policy, adapter):
    """Return the weights that the modules compute with while `adapter` is active, with DoRA's scale."""
    policy.set_adapter(adapter)
    with torch.no_grad():
        found = {}
        for name, layer in layers(policy, adapter).items():
            if isinstance(layer.get_base_layer(), torch.nn.Embedding):
                out = layer(torch.arange(layer.get_base_layer().num_embeddings))
            else:
                out = layer(torch.eye(layer.in_features)) - layer(torch.zeros(1, layer.in_features))
            found[name] = out.T.double()
    policy.set_adapter("default")
    return found


def masters(average, directory, names):
    directory.mkdir(exist_ok=True)
    average.save(directory, rank=0, writes=True)
    found = {}
    with TensorReader(directory) as reader:
        for name in names:
            short = name.removeprefix("base_model.model.")
            left = reader.whole(f"{short}.left", reader.shape(f"{short}.left"))
            found[name] = left.double() @ reader.whole(f"{short}.right", reader.shape(f"{short}.right")).double()
    return found


def worst(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert len(theirs) > 0
    return max(float((ours[name] - value).norm() / value.norm()) for name, value in theirs.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_fifty_syncs_against_float64(alpha, dtype, tmp_path):
    policy = adapted(dtype=dtype, **WIDE)
    average = averaged(policy)
    training, oracle = Training(policy, noise=0.02), deltas(policy)  # as much noise as drift: the rank fills up
    for _ in range(50):
        training.step()
        average.move_to_policy(alpha)
        for name, delta in deltas(policy).items():
            oracle[name] = alpha * delta + (1 - alpha) * oracle[name]
    error = worst(masters(average, tmp_path, oracle), oracle)
    assert error < 1e-3
    assert average.counters()["average_error"] >= error - 1e-6  # the logged value is a bound
    assert worst(deltas(policy, REFERENCE_ADAPTER), oracle) < (1e-3 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(
    "config",
    [
        lora(use_rslora=True, lora_alpha=13),
        lora(rank_pattern={"q_proj": 2, "down_proj": 5}, alpha_pattern={"q_proj": 3}),
        lora(target_modules=["q_proj", "embed_tokens"]),
        lora(use_dora=True),
        lora(use_dora=True, use_rslora=True),
        lora(init_lora_weights=False),
        lora(init_lora_weights="pissa"),
        lora(init_lora_weights="olora"),
    ],
    ids=["rslora", "ranks", "embedding", "dora", "dora_rslora", "random", "pissa", "olora"],
)
@pytest.mark.parametrize("alpha", [0.6, 0.05])
def test_kinds_of_adapter(config, alpha):
    policy = adapted(copy.deepcopy(config), **WIDE)
    average = averaged(policy)
    training, oracle = Training(policy), effective(policy, "default")
    start = effective(policy, REFERENCE_ADAPTER)
    assert worst(start, oracle) < 1e-5
    for _ in range(12):
        training.step()
        average.move_to_policy(alpha)
        for name, weight in effective(policy, "default").items():
            oracle[name] = alpha * weight + (1 - alpha) * oracle[name]
    reference = effective(policy, REFERENCE_ADAPTER)
    moved = {name: weight - start[name] for name, weight in oracle.items()}
    assert worst({name: weight - start[name] for name, weight in reference.items()}, moved) < 2e-3


@pytest.mark.parametrize("dora", [False, True])
def test_transposed_weights(dora):
    """GPT-2 keeps its weights transposed."""
    config = lora(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, use_dora=dora)
    policy = adapted(config, "gpt2", n_embd=64, n_head=4)
    average = averaged(policy)
    training, oracle = Training(policy), effective(policy, "default")
    start = effective(policy, REFERENCE_ADAPTER)
    for _ in range(5):
        training.step()
        average.move_to_policy(0.3)
        for name, weight in effective(policy, "default").items():
            oracle[name] = 0.3 * weight + 0.7 * oracle[name]
    reference = effective(policy, REFERENCE_ADAPTER)
    moved = {name: weight - start[name] for name, weight in oracle.items()}
    assert worst({name: weight - start[name] for name, weight in reference.items()}, moved) < 1e-3


@pytest.mark.parametrize(
    "overrides",
    [{"modules_to_save": ["lm_head", "norm"]}, {"trainable_token_indices": [5, 6]}],
    ids=["save", "tokens"],
)
@pytest.mark.parametrize("average", ["exact", "factors"])
def test_what_is_trained_whole(average, overrides):
    policy = adapted(lora(target_modules=["q_proj"], **overrides))
    moving = averaged(policy, average=average)
    others = [n for n in adapter_parameters(policy, "default") if ".lora_" not in n]
    assert others
    training = Training(policy)
    oracle = {n: adapter_parameters(policy, "default")[n].detach().double() for n in others}
    for _ in range(5):
        training.step()
        moving.move_to_policy(0.3)
        for name in others:
            oracle[name] = 0.3 * adapter_parameters(policy, "default")[name].detach().double() + 0.7 * oracle[name]
    ours = {n: adapter_parameters(policy, REFERENCE_ADAPTER)[n].detach().double() for n in others}
    assert worst(ours, oracle) < 1e-6


def test_factors_average_a_and_b_and_that_is_another_method():
    policy = adapted(lora(use_rslora=True))
    average = averaged(policy, average="factors")
    training = Training(policy)
    names = adapter_parameters(policy, "default")
    oracle = {n: p.detach().double() for n, p in names.items()}
    products = deltas(policy)
    for _ in range(10):
        training.step()
        average.move_to_policy(0.3)
        oracle = {n: 0.3 * p.detach().double() + 0.7 * oracle[n] for n, p in names.items()}
        products = {n: 0.3 * d + 0.7 * products[n] for n, d in deltas(policy).items()}
    ours = adapter_parameters(policy, REFERENCE_ADAPTER)
    assert worst({n: p.detach().double() for n, p in ours.items()}, oracle) < 1e-6
    assert worst(deltas(policy, REFERENCE_ADAPTER), products) > 1e-2
    assert average.counters() == {}


@pytest.mark.parametrize("average", ["exact", "factors"])
def test_becomes_the_policy(average):
    policy = adapted()
    moving = averaged(policy, average=average)
    training = Training(policy)
    for _ in range(3):
        training.step()
        assert moving.distance_to_policy() > 0
        moving.move_to_policy(1.0)
        assert moving.distance_to_policy() == pytest.approx(0.0, abs=1e-6)
    assert worst(deltas(policy, REFERENCE_ADAPTER), deltas(policy)) < 1e-6


def test_distance():
    policy = adapted(lora(init_lora_weights=False))
    average, start = averaged(policy), deltas(policy)
    Training(policy).step()
    now = deltas(policy)
    difference = sum(float((now[name] - start[name]).norm() ** 2) for name in now)
    size = sum(float(delta.norm() ** 2) for delta in now.values())
    assert average.distance_to_policy() == pytest.approx((difference / size) ** 0.5, rel=1e-5)


class TestRanks:
    def test_overflow_is_told_with_the_error_it_leaves(self, caplog):
        policy = adapted(**WIDE)
        average = averaged(policy, max_rank=8)
        training, oracle = Training(policy, noise=0.02), deltas(policy)
        for _ in range(5):
            training.step()
            average.move_to_policy(0.3)
            oracle = {name: 0.3 * d + 0.7 * oracle[name] for name, d in deltas(policy).items()}
        assert caplog.text.count("Raise max_rank") == 1
        assert "tolerance=0.0001" in caplog.text
        error = worst(deltas(policy, REFERENCE_ADAPTER), oracle)
        assert 1e-3 < error <= average.counters()["average_error"]
        assert average.counters()["rank"] == 8

    def test_no_overflow_no_warning(self, caplog):
        policy = adapted(**WIDE)
        average, training = averaged(policy, max_rank=64), Training(policy)
        for _ in range(3):
            training.step()
            average.move_to_policy(0.6)
        assert "max_rank" not in caplog.text

    def test_tolerance_is_rank_against_error(self):
        ranks = []
        for tolerance in (1e-2, 1e-4, 1e-6):
            policy = adapted(**WIDE)
            average, training = averaged(policy, max_rank=100, tolerance=tolerance), Training(policy)
            for _ in range(10):
                training.step()
                average.move_to_policy(0.1)
            ranks.append(average.counters()["rank"])
        assert ranks == sorted(set(ranks))

    def test_less_than_the_policys(self):
        with pytest.raises(ConfigurationError, match=r"max_rank=4 is less than the rank 8 .*q_proj"):
            averaged(adapted(), max_rank=4)

    def test_shapes_never_change(self):
        policy = adapted(**WIDE)
        average, training = averaged(policy), Training(policy)
        before = {n: p.shape for n, p in adapter_parameters(policy, REFERENCE_ADAPTER).items()}
        for _ in range(3):
            training.step()
            average.move_to_policy(0.3)
        assert {n: p.shape for n, p in adapter_parameters(policy, REFERENCE_ADAPTER).items()} == before
        assert {p.shape[0] for n, p in adapter_parameters(policy, REFERENCE_ADAPTER).items() if "_A" in n} == {32}


class TestMemory:
    @pytest.mark.parametrize("max_rank", [None, 8, 24])
    def test_of_what_is_kept(self, max_rank):
        policy = adapted(**WIDE)
        own = {n: p.numel() for n, p in adapter_parameters(policy, "default").items()}
        average, training = averaged(policy, max_rank=max_rank), Training(policy)
        for _ in range(10):
            training.step()
            average.move_to_policy(0.1)
        second = {n: p.numel() for n, p in adapter_parameters(policy, REFERENCE_ADAPTER).items()}
        ratio = (max_rank or 32) / 8
        assert all(second[name] <= ratio * count for name, count in own.items())
        products = average._products.values()
        kept = sum(p.matrix.left.numel() + p.matrix.right.numel() for p in products)
        assert kept <= ratio * sum(own.values())

    def test_no_dense_delta_during_a_sync(self):
        # There is one adapted module, so large that a dense delta of it would be noticed.
        policy = adapted(
            lora(r=2, target_modules=["down_proj"]), hidden_size=1024, intermediate_size=2048, num_hidden_layers=1
        )
        average, training = averaged(policy), Training(policy)
        training.step()
        average.move_to_policy(0.3)
        dense = 1024 * 2048 * 4
        assert peak_bytes(lambda: average.move_to_policy(0.3)) < dense / 4
        assert peak_bytes(lambda: deltas(policy)) > dense  # the measurement notices a dense delta where there is one


class TestRefused:
    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (lora(lora_bias=True, target_modules=["q_proj"]), "lora_bias"),
            (lora(use_dora=True, target_modules=["embed_tokens"]), "DoRA on the embedding .*embed_tokens"),
            (IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"), "IA3"),
        ],
        ids=["lora_bias", "dora_embedding", "ia3"],
    )
    def test_by_name(self, config, message):
        with pytest.raises(ConfigurationError, match=message):
            averaged(adapted(config, attention_bias=True))

    def test_experts(self):
        config = lora(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
        with pytest.raises(ConfigurationError, match="target_parameters"):
            averaged(adapted(config, "mixtral"))


@pytest.mark.parametrize("overrides", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=str)
@pytest.mark.parametrize("average", ["exact", "factors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_and_restored_to_the_bit(average, overrides, dtype, tmp_path):
    policy = adapted(lora(**overrides), dtype=dtype)
    one, training = averaged(policy, average=average), Training(policy)
    for _ in range(3):
        training.step()
        one.move_to_policy(0.3)
    one.save(tmp_path, rank=0, writes=True)
    other_policy = adapted(lora(**overrides), dtype=dtype)
    other = averaged(other_policy, average=average)
    other.load(tmp_path)
    with torch.no_grad():
        for name, p in adapter_parameters(other_policy, "default").items():
            p.copy_(adapter_parameters(policy, "default")[name])
    training.step()
    with torch.no_grad():
        for name, p in adapter_parameters(other_policy, "default").items():
            p.copy_(adapter_parameters(policy, "default")[name])
    for average_ in (one, other):
        average_.move_to_policy(0.3)
    theirs = adapter_parameters(other_policy, REFERENCE_ADAPTER)
    assert all(torch.equal(p, theirs[name]) for name, p in adapter_parameters(policy, REFERENCE_ADAPTER).items())
    assert one.counters() == other.counters()


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]},
    ],
    ids=str,
)
@pytest.mark.parametrize("average", ["exact", "factors"])
def test_what_is_saved_is_an_ordinary_adapter_too(average, overrides, tmp_path):
    policy = adapted(lora(**overrides))
    moving, training = averaged(policy, average=average), Training(policy)
    for _ in range(2):
        training.step()
        moving.move_to_policy(0.3)
    moving.save(tmp_path, rank=0, writes=True)
    loaded = PeftModel.from_pretrained(tiny.model(), tmp_path / "adapter").eval()
    ids = torch.arange(3, 23)[None]
    with torch.no_grad(), reference_active(policy, REFERENCE_ADAPTER):
        expected = policy(ids).logits
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(policy(ids).logits, expected, atol=1e-2)
