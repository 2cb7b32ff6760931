"""Run by test_precompute.py under torchrun: `precompute` with a policy that FSDP2 shards on the CPU."""

import sys

from tests.trainers.two_ranks import allow_fsdp_on_cpu
from trl_refplug.cli import launched
from trl_refplug.cli.tasks import Precompute


if __name__ == "__main__":
    allow_fsdp_on_cpu()
    launched.train("dpo", sys.argv[1:], Precompute())
