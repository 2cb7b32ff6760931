"""Models that are spread over two ranks give the same numbers, and both ranks make equally many passes."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from tests.scoring.models import batch_of, random_batch, tiny
from tests.scoring.test_packable import LeakyLayer
from tests.scoring.test_scorer import TOLERANCE, trl_log_probs
from trl_refplug.errors import UnsupportedInputError
from trl_refplug.rows import Row
from trl_refplug.scoring import ExactFallbackWarning, Scorer
from trl_refplug.testing.ranks import launch


def on_two_ranks(check, *args):
    launch(_on_one_rank, check, args)


def _on_one_rank(check, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))  # ends a deadlock
    check(int(os.environ["RANK"]), *args)
    dist.barrier()


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
    # If only one rank can pack its batch, both ranks still make the same number of passes
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
    on_two_ranks(check_sharded, *SHARDED)


def check_replicated(rank):
    model = tiny("llama")
    Scorer(model)
    replica = torch.nn.parallel.DistributedDataParallel(model)
    scorer = Scorer(replica, mode="packed", token_budget=16)
    for seed in range(3):
        batch = random_batch(seed=10 * seed + rank, groups=1 + 4 * rank)
        expected = trl_log_probs(tiny("llama"), batch)
        torch.testing.assert_close(scorer.log_probs(batch), expected, rtol=0, atol=TOLERANCE)
    assert scorer.stats.forwards == 3  # one per batch
    assert scorer.stats.fallback is None
    check_not_trusted(rank)


def check_not_trusted(rank):
    """A first batch without scored tokens does not make a scorer trust its packed answers."""
    model = tiny("llama")
    model.model.layers[0].__class__ = LeakyLayer
    scorer = Scorer(torch.nn.parallel.DistributedDataParallel(model), mode="packed")
    with pytest.warns(ExactFallbackWarning, match="differ"):
        scorer.log_probs(batch_of([[5, 6, 7]], [[]]))
    batch = random_batch(seed=rank)
    assert torch.equal(scorer.log_probs(batch), trl_log_probs(model, batch))


def test_replicated_models():
    on_two_ranks(check_replicated)


def check_tensor_parallel(rank, directory, kind, mode):
    """With tensor parallelism the ranks are one model, so that they score the same batches."""
    model = AutoModelForCausalLM.from_pretrained(directory, distributed_config=DistributedConfig(tp_size=2)).eval()
    weights = {name: parameter for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)}
    assert any("lm_head" in name or "embed_tokens" in name for name in weights)
    assert any("q_proj" in name for name in weights)
    scorer = Scorer(model, mode=mode, token_budget=16)
    for seed in range(3):
        batch = random_batch(seed=seed, side=("left", "right")[seed % 2])
        expected = trl_log_probs(tiny(kind), batch)
        torch.testing.assert_close(scorer.log_probs(batch), expected, rtol=0, atol=TOLERANCE)
    assert scorer.stats.fallback is None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["exact", "packed"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_tensor_parallel_models(tmp_path, kind, mode):
    tiny(kind).save_pretrained(tmp_path)
    on_two_ranks(check_tensor_parallel, tmp_path, kind, mode)
