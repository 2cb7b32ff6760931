"""On two ranks with `fully_shard` on the CPU, every rank moves its own shards, and nothing large is sent."""

import pytest
import torch

from trl_refplug.providers.ema.tensor_files import TensorReader
from trl_refplug.testing.ranks import launch

from . import two_ranks_ema


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("sharded")
    ranks = launch(two_ranks_ema.run_all, out)
    return out, [ranks[rank] for rank in (0, 1)]


def test_full_fine_tuning_communicates_nothing(results):
    _, ranks = results
    for rank in ranks:
        assert max(rank["full"]["collectives"], default=0) <= 1
        assert rank["full"]["control"] > 1000  # if weights were gathered, the counter would notice


def test_full_fine_tuning_has_the_unsharded_values(results):
    _, ranks = results
    for rank in ranks:
        # The gradients of two ranks are added up in another order.
        assert rank["full"]["error"] < 1e-6
        assert rank["full"]["distances"][0] == pytest.approx(rank["full"]["distances"][1], rel=1e-4)
        assert max(rank["full"]["of_distance"]) <= 2


def test_full_fine_tuning_is_saved_in_shards(results):
    out, ranks = results
    assert len(list((out / "full").glob("*.safetensors"))) == 2
    expected = torch.load(out / "full.pt")
    with TensorReader(out / "full") as reader:
        for name, weight in expected.items():
            torch.testing.assert_close(reader.whole(name, tuple(weight.shape)), weight, rtol=1e-6, atol=1e-7)
    for rank in ranks:
        assert rank["full"]["moved"] > 1e-3
        assert rank["full"]["restored"] == 0


def test_bias_corrected_average_is_sharded_as_the_model_is(results):
    out, ranks = results
    assert len(list((out / "bias_corrected").glob("*.safetensors"))) == 2
    for rank in ranks:
        assert max(rank["bias_corrected"]["collectives"], default=0) == 0
        assert rank["bias_corrected"]["moved"] > 1e-3
        assert rank["bias_corrected"]["error"] == 0
        assert rank["bias_corrected"]["resumed"] == 0


def test_adapters_gather_one_factor_at_a_time(results):
    _, ranks = results
    for rank in ranks:
        assert 0 < max(rank["adapter"]["collectives"]) <= rank["adapter"]["largest_factor"]


def test_adapters_have_the_unsharded_values(results):
    _, ranks = results
    for rank in ranks:
        assert rank["adapter"]["moved"] > 1e-3
        assert rank["adapter"]["error"] < 1e-4
        assert rank["adapter"]["restored"] == 0
        assert rank["adapter"]["distances"][0] == pytest.approx(rank["adapter"]["distances"][1], rel=1e-3)
