"""Digests of models of which no rank has all weights. test_identity.py runs these functions on two ranks."""

import os

import torch
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh

from tests import tiny
from trl_refplug.models.identity import digest_model


def of_sharded(kind: str) -> str:
    torch.distributed.init_process_group("gloo")
    model = tiny.model(kind)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fsdp.fully_shard(layer, mesh=mesh)
    fsdp.fully_shard(model, mesh=mesh)
    return digest_model(model)


def of_first_rank_only(kind: str) -> str:
    """The digest after FSDP's memory-saving loading, in which only the first rank has weights."""
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_CPU_RAM_EFFICIENT_LOADING="true")
    torch.distributed.init_process_group("gloo")
    model = tiny.model(kind)
    return digest_model(model.to("meta") if torch.distributed.get_rank() == 1 else model)
