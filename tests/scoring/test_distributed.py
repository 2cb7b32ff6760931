"""Models spread over two ranks: the same numbers, and as many forward passes on each."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.scoring.models import batch_of, random_batch, tiny
from tests.scoring.test_scorer import TOLERANCE, trl_log_probs
from trl_refplug.errors import UnsupportedInputError
from trl_refplug.scoring import Row, Scorer


def run_on_two_ranks(check, *args):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_rank, (port, check, args), nprocs=2)


def _rank(rank, port, check, args):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        check(rank, *args)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def sharded(kind):
    model = tiny(kind)
    Scorer(model)  # adds the head, as TRL does before it shards the model
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def check_sharded(rank, kind, mode):
    model = sharded(kind)
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
    # A first batch that only one rank can verify leaves both in step
    scorer = Scorer(model, mode=mode)
    holes = random_batch(seed=8)
    holes.attention_mask[0, 3] = 0
    for batch in (holes if rank else batches[2][1], *batches[2]):
        expected = trl_log_probs(tiny(kind), batch)
        torch.testing.assert_close(scorer.log_probs(batch), expected, rtol=0, atol=TOLERANCE)
    with pytest.raises(UnsupportedInputError, match="log_probs"):
        next(scorer.score_rows([Row.completion([5], [6])]))


@pytest.mark.parametrize(("kind", "mode"), [("llama", "exact"), ("llama", "packed"), ("qwen2", "packed")])
@pytest.mark.filterwarnings("ignore")
def test_fully_sharded_models(kind, mode):
    run_on_two_ranks(check_sharded, kind, mode)


def check_replicated(rank):
    model = tiny("llama")
    Scorer(model)
    replica = torch.nn.parallel.DistributedDataParallel(model)
    scorer = Scorer(replica, mode="packed", token_budget=16)
    for seed in range(3):
        batch = random_batch(seed=10 * seed + rank, groups=1 + 4 * rank)
        expected = trl_log_probs(tiny("llama"), batch)
        torch.testing.assert_close(scorer.log_probs(batch), expected, rtol=0, atol=TOLERANCE)
    assert scorer.stats.forwards == 4  # one a batch, and one to verify
    assert scorer.stats.fallback is None


def test_replicated_models():
    run_on_two_ranks(check_replicated)
