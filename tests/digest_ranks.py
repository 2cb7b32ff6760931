"""Run by test_identity.py under torchrun: FSDP's memory-saving loading, where only rank 0 has weights."""

import os
import sys

import torch.distributed

from tests import tiny
from trl_refplug.identity import digest_model


os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_CPU_RAM_EFFICIENT_LOADING="true")
torch.distributed.init_process_group("gloo")
model = tiny.model("llama")
if torch.distributed.get_rank() == 1:
    model = model.to("meta")
if digest_model(model) != sys.argv[1]:
    sys.exit(1)
torch.distributed.destroy_process_group()
