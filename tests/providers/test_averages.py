"""The moving average of whole models has TRL's own numbers in float32, and the right ones in low precision."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.trainer.callbacks import SyncRefModelCallback

from trl_refplug import ConfigurationError, ReferenceMismatchError
from trl_refplug.providers.ema.model_average import ModelAverage
from trl_refplug.providers.ema.tensor_files import TensorReader

from .. import tiny


ALPHAS = [1.0, 0.6, 0.1, 0.01, 0.001]


def moved(model, generator, scale=0.02):
    """Move the policy by random numbers, instead of a training step."""
    with torch.no_grad():
        for parameter in model.parameters():
            step = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_((parameter.float() + step).to(parameter.dtype))


def stored(average, directory, model):
    """Return the average itself, in the precision in which it is kept."""
    directory.mkdir(exist_ok=True)
    average.save(directory, rank=0, writes=True)
    with TensorReader(directory) as reader:
        return {name: reader.whole(name, tuple(p.shape)) for name, p in model.named_parameters()}


def distance(ours, theirs):
    difference = sum((ours[name].double() - value.double()).square().sum() for name, value in theirs.items())
    return float(
        (difference.detach() / sum(value.detach().double().square().sum() for value in theirs.values())) ** 0.5
    )


@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": True}], ids=["", "tied"])
@pytest.mark.parametrize("architecture", list(tiny.ARCHITECTURES))
@pytest.mark.parametrize("alpha", [0.6, 0.1, 1.0])
def test_equals_trl_bit_for_bit(architecture, overrides, alpha):
    policy = tiny.model(architecture, **overrides)
    ours, theirs = copy.deepcopy(policy), copy.deepcopy(policy)
    average = ModelAverage(ours, lambda: policy, torch.float32)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        moved(policy, generator)
        average.move_to_policy(alpha)
        SyncRefModelCallback._sync_target_model(policy, theirs, alpha)
    expected = dict(theirs.named_parameters())
    assert all(torch.equal(parameter, expected[name]) for name, parameter in ours.named_parameters())
    assert not torch.equal(next(ours.parameters()), next(tiny.model(architecture).parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_fifty_syncs_against_float64(alpha, dtype, tmp_path):
    policy = tiny.model("llama").to(dtype)
    reference = copy.deepcopy(policy)
    oracle = {name: p.detach().double() for name, p in policy.named_parameters()}
    start = {name: p.clone() for name, p in oracle.items()}
    average = ModelAverage(reference, lambda: policy, torch.float32)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        moved(policy, generator)
        average.move_to_policy(alpha)
        for name, parameter in policy.named_parameters():
            oracle[name] = alpha * parameter.detach().double() + (1 - alpha) * oracle[name]
    assert distance(stored(average, tmp_path, policy), oracle) < 1e-6
    assert distance(start, oracle) > 1e-4  # else an average that never moves would pass
    for name, parameter in reference.named_parameters():
        # The reference that scores is the average, rounded once.
        assert torch.equal(parameter, stored(average, tmp_path, policy)[name].to(dtype))


def test_bfloat16_alone_would_not_move(tmp_path):
    policy = tiny.model("llama").to(torch.bfloat16)
    start = copy.deepcopy(policy)
    generator = torch.Generator().manual_seed(0)
    moved(policy, generator, scale=0.002)
    moves = {}
    for dtype in (torch.float32, torch.bfloat16):
        reference = copy.deepcopy(start)
        average = ModelAverage(reference, lambda: policy, dtype)
        for _ in range(50):
            average.move_to_policy(0.001)
        kept = stored(average, tmp_path / str(dtype), policy)
        moves[dtype] = distance(kept, {name: p.detach() for name, p in start.named_parameters()})
    towards = distance(dict(policy.named_parameters()), dict(start.named_parameters()))
    assert moves[torch.float32] / towards == pytest.approx(1 - 0.999**50, rel=1e-2)
    assert moves[torch.bfloat16] < 0.2 * moves[torch.float32]


@settings(max_examples=50)
@given(
    alpha=st.floats(0, 1, width=32),
    values=st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=8),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_alpha(alpha, values, dtype):
    reference, policy = (torch.nn.Linear(len(values) // 2, 1, bias=False) for _ in range(2))
    half = len(values) // 2
    with torch.no_grad():
        reference.weight.copy_(torch.tensor([values[:half]]))
        policy.weight.copy_(torch.tensor([values[half : 2 * half]]))
    expected = alpha * policy.weight.double() + (1 - alpha) * reference.weight.double()
    ModelAverage(reference, lambda: policy, dtype).move_to_policy(alpha)
    torch.testing.assert_close(reference.weight.double(), expected, rtol=1e-5, atol=1e-4)


def test_masters_only_where_they_are_needed(tmp_path):
    def masters(model, *args):
        return ModelAverage(model, lambda: model, *args)._masters

    device = torch.device("cpu")
    assert not masters(tiny.model(), torch.float32, None)
    assert not masters(tiny.model(), torch.bfloat16, device)
    assert len(masters(tiny.model().bfloat16(), torch.float32, None)) == len(list(tiny.model().parameters()))
    assert not masters(tiny.model().bfloat16(), torch.bfloat16, None)
    assert all(m.dtype == torch.float64 for m in masters(tiny.model(), torch.float64, device).values())


def test_buffers_are_copied():
    def module(value):
        norm = torch.nn.BatchNorm1d(3)
        norm.running_mean.fill_(value)
        norm.num_batches_tracked.fill_(int(value))
        return norm

    policy, reference = module(5.0), module(0.0)
    ModelAverage(reference, lambda: policy, torch.float32).move_to_policy(0.25)
    assert torch.equal(reference.running_mean, policy.running_mean)
    assert int(reference.num_batches_tracked) == 5


class TestPairs:
    def test_name(self):
        average = ModelAverage(tiny.model("llama"), lambda: tiny.model("gpt2"), torch.float32)
        with pytest.raises(ConfigurationError, match="ref_model"):
            average.check_same_architecture()

    def test_shape(self):
        average = ModelAverage(tiny.model("llama", intermediate_size=64), lambda: tiny.model("llama"), torch.float32)
        with pytest.raises(ConfigurationError, match=r"gate_proj.*\[48, 32\].*\[64, 32\]"):
            average.check_same_architecture()

    def test_wrappers(self):
        policy, reference = tiny.model(), tiny.model(seed=1)
        average = ModelAverage(reference, lambda: torch.compile(policy), torch.float32)
        average.move_to_policy(1.0)
        assert torch.equal(reference.lm_head.weight, policy.lm_head.weight)


def test_distance():
    policy, reference = tiny.model(), tiny.model(seed=1)
    average = ModelAverage(reference, lambda: policy, torch.float32)
    expected = distance(dict(reference.named_parameters()), dict(policy.named_parameters()))
    assert average.distance_to_policy() == pytest.approx(expected, rel=1e-5)
    average.move_to_policy(1.0)
    assert average.distance_to_policy() == 0.0


class TestFiles:
    def saved(self, tmp_path, dtype=torch.float32):
        policy = tiny.model().to(dtype)
        average = ModelAverage(copy.deepcopy(policy), lambda: policy, torch.float32)
        moved(policy, torch.Generator().manual_seed(1))
        average.move_to_policy(0.3)
        return policy, average, stored(average, tmp_path, policy)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_round_trip(self, dtype, tmp_path):
        policy, average, before = self.saved(tmp_path, dtype)
        again = ModelAverage(tiny.model(seed=9).to(dtype), lambda: policy, torch.float32)
        again.load(tmp_path)
        for step in (average, again):
            step.move_to_policy(0.1)
        after = stored(average, tmp_path / "one", policy)
        other = stored(again, tmp_path / "other", policy)
        assert all(torch.equal(after[name], other[name]) for name in before)
        assert not all(torch.equal(after[name], before[name]) for name in before)

    def test_where_the_trainer_writes(self, tmp_path):
        """It may write on other ranks than the first: nodes may have disks of their own (`save_on_each_node`)."""
        policy, average, before = self.saved(tmp_path / "first")
        for rank, writes in ((1, False), (2, True)):
            (tmp_path / str(rank)).mkdir()
            average.save(tmp_path / str(rank), rank=rank, writes=writes)
        assert not list((tmp_path / "1").iterdir())
        again = ModelAverage(tiny.model(seed=9), lambda: policy, torch.float32)
        again.load(tmp_path / "2")
        assert all(torch.equal(value, before[name]) for name, value in again._reference.named_parameters())

    def test_missing_file(self, tmp_path):
        _, average, _ = self.saved(tmp_path)
        for path in tmp_path.glob("*.safetensors"):
            path.unlink()
        with pytest.raises(ReferenceMismatchError, match="damaged"):
            average.load(tmp_path)

    def test_truncated_file(self, tmp_path):
        _, average, _ = self.saved(tmp_path)
        (path,) = tmp_path.glob("*.safetensors")
        path.write_bytes(path.read_bytes()[:-8])
        with pytest.raises(ReferenceMismatchError, match=r"00000\.safetensors cannot be read"):
            average.load(tmp_path)

    def test_another_shape(self, tmp_path):
        self.saved(tmp_path)
        other = ModelAverage(tiny.model(intermediate_size=64), tiny.model, torch.float32)
        with pytest.raises(ReferenceMismatchError, match=r"expected \[64, 32\]"):
            other.load(tmp_path)

    def test_large_models_go_to_several_files(self, tmp_path, monkeypatch):
        monkeypatch.setattr("trl_refplug.providers.ema.tensor_files._BYTES_PER_FILE", 10_000)
        _, average, before = self.saved(tmp_path)
        files = list(tmp_path.glob("*.safetensors"))
        assert len(files) > 3
        average.load(tmp_path)
        assert all(torch.equal(p, before[name]) for name, p in average._reference.named_parameters())
        files[1].unlink()
        with pytest.raises(ReferenceMismatchError, match="damaged"):
            average.load(tmp_path)

    def test_parts_of_ranks(self, tmp_path):
        """The parts are put together again, and a missing part is noticed."""
        from trl_refplug.models.sharding import Part
        from trl_refplug.providers.ema.tensor_files import write_tensors

        whole = torch.arange(21.0).reshape(7, 3)
        for rank, (start, length) in enumerate([(0, 4), (4, 3)]):
            part = Part((7, 3), (start, 0), (length, 3))
            flat = Part((21,), (11 * rank,), (11 - rank,))
            entries = [
                ("w", part.slice_of(whole), part, whole.dtype),
                ("z", flat.slice_of(whole), flat, torch.bfloat16),
            ]
            write_tensors(tmp_path, rank, entries)
        with TensorReader(tmp_path) as reader:
            assert torch.equal(reader.whole("w", (7, 3)), whole)
            assert torch.equal(reader.whole("z", (7, 3)), whole)
            assert reader.dtypes == {"w": torch.float32, "z": torch.bfloat16}
        (tmp_path / "reference-00001-00000.safetensors").unlink()
        with TensorReader(tmp_path) as reader, pytest.raises(ReferenceMismatchError, match="rank's file is missing"):
            reader.whole("w", (7, 3))


def test_json_layout_is_plain(tmp_path):
    """The files are ordinary safetensors files, which anyone can read."""
    from safetensors import safe_open

    TestFiles().saved(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["lm_head.weight"]) == [[380, 32], [0, 0], "float32"]
