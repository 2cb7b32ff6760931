"""Run by test_identity.py under torchrun: the digest of a model sharded by `fully_shard` over two gloo ranks."""

import sys
from pathlib import Path

import torch
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh

from tests import tiny
from trl_refplug.identity import digest_model


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    model = tiny.model(sys.argv[1])
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fsdp.fully_shard(layer, mesh=mesh)
    fsdp.fully_shard(model, mesh=mesh)
    rank = torch.distributed.get_rank()
    Path(sys.argv[2], f"rank{rank}").write_text(digest_model(model))
    torch.distributed.destroy_process_group()
