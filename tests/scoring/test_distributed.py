"""Models spread over two ranks: the same numbers, and as many forward passes on each."""

import tempfile
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.scoring.models import batch_of, random_batch, tiny
from tests.scoring.test_safety import LeakyLayer
from tests.scoring.test_scorer import TOLERANCE, trl_log_probs
from trl_refplug.errors import UnsupportedInputError
from trl_refplug.scoring import ExactFallbackWarning, Row, Scorer


def run_on_two_ranks(check, *args):
    with tempfile.TemporaryDirectory() as directory:
        arguments = (Path(directory) / "meeting").as_uri(), check, args
        mp.start_processes(_rank, arguments, nprocs=2, start_method="forkserver")


def _rank(rank, meeting, check, args):
    torch.set_num_threads(1)
    timeout = timedelta(seconds=60)  # ranks that wait for each other fail
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=timeout)
    try:
        check(rank, *args)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def sharded(kind, head_apart=False):
    model = tiny(kind)
    Scorer(model)  # adds the head, as TRL does before it shards the model
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for module in [*model.model.layers, *([model.lm_head] if head_apart else [])]:
        fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def check_sharded(rank, *cases):
    for case in cases:
        check_one_sharded(rank, *case)


def check_one_sharded(rank, kind, mode, head_apart):
    model = sharded(kind, head_apart)
    assert any(isinstance(parameter, DTensor) for parameter in model.parameters())
    scorer = Scorer(model, mode=mode, token_budget=16)
    unscored = batch_of([[5, 6, 7]], [[]])
    batches = [
        [random_batch(seed=rank), random_batch(seed=2 + rank, groups=1 + 4 * rank)],
        [random_batch(seed=4), unscored if rank else random_batch(seed=5)],
        [unscored if rank else random_batch(seed=6), random_batch(seed=7)],
    ]
    for first, second in batches[:2]:
        for batch in (first, second):
            expected = trl_log_probs(tiny(kind), batch)
            torch.testing.assert_close(scorer.log_probs(batch), expected, rtol=0, atol=TOLERANCE)
    assert scorer.stats.fallback is None
    # A batch that only one rank can pack leaves both in step
    scorer = Scorer(model, mode=mode)
    holes = random_batch(seed=8)
    holes.attention_mask[0, 3] = 0
    for batch in (holes if rank else batches[2][1], *batches[2], batches[2][1] if rank else holes):
        expected = trl_log_probs(tiny(kind), batch)
        torch.testing.assert_close(scorer.log_probs(batch), expected, rtol=0, atol=TOLERANCE)
    with pytest.raises(UnsupportedInputError, match="log_probs"):
        next(scorer.score_rows([Row.completion([5], [6])]))


SHARDED = [("llama", "exact", False)] + [
    (kind, "packed", head_apart) for kind, head_apart in (("llama", False), ("llama", True), ("qwen2", False))
]


@pytest.mark.filterwarnings("ignore")
def test_fully_sharded_models():
    run_on_two_ranks(check_sharded, *SHARDED)


def check_replicated(rank):
    model = tiny("llama")
    Scorer(model)
    replica = torch.nn.parallel.DistributedDataParallel(model)
    scorer = Scorer(replica, mode="packed", token_budget=16)
    for seed in range(3):
        batch = random_batch(seed=10 * seed + rank, groups=1 + 4 * rank)
        expected = trl_log_probs(tiny("llama"), batch)
        torch.testing.assert_close(scorer.log_probs(batch), expected, rtol=0, atol=TOLERANCE)
    assert scorer.stats.forwards == 3  # one a batch
    assert scorer.stats.fallback is None
    check_not_trusted(rank)


def check_not_trusted(rank):
    """A first batch without labels proves nothing."""
    model = tiny("llama")
    model.model.layers[0].__class__ = LeakyLayer
    scorer = Scorer(torch.nn.parallel.DistributedDataParallel(model), mode="packed")
    with pytest.warns(ExactFallbackWarning, match="differ"):
        scorer.log_probs(batch_of([[5, 6, 7]], [[]]))
    batch = random_batch(seed=rank)
    assert torch.equal(scorer.log_probs(batch), trl_log_probs(model, batch))


def test_replicated_models():
    run_on_two_ranks(check_replicated)
