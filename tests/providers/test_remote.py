"""`remote`: the numbers of `frozen`, from a server, for every trainer."""

import pytest
import torch

from trl_refplug import ConfigurationError, ReferenceMismatchError

from .. import tiny
from ..serving.servers import engine, serving
from ..trainers.runs import assert_same, build, train


@pytest.fixture(scope="module")
def exact():
    with serving(engine(scoring="exact")) as url:
        yield url


@pytest.fixture(scope="module")
def packed():
    with serving(engine()) as url:
        yield url


def remote(url, **options):
    return {"ref_provider": "remote", "ref_provider_kwargs": {"url": url, **options}}


class TestSameTraining:
    @pytest.mark.parametrize("kind", ["dpo", "kto", "grpo", "rloo"])
    def test_exact_is_frozen_bit_for_bit(self, kind, tmp_path, exact):
        path = tiny.saved(tmp_path)
        frozen = train(kind, tmp_path, path, args={"ref_provider": "frozen"})
        state = torch.get_rng_state()
        ours = train(kind, tmp_path, path, args=remote(exact))
        assert_same(ours, frozen)
        assert torch.equal(torch.get_rng_state(), state)
