"""Run by test_cached_processes.py: builds a trainer that fills a store, a shard for every few rows."""

import functools
import sys
from pathlib import Path

import trl_refplug.store
from tests import tiny
from tests.trainers.runs import build


def main() -> None:
    model, path, out = sys.argv[1:]
    trl_refplug.store.LogProbStore = functools.partial(trl_refplug.store.LogProbStore, publish_rows=20)
    args = {"ref_provider": "cached", "ref_provider_kwargs": {"path": path}}
    build("dpo", Path(out), model, args=args, train_dataset=tiny.preference_data(600))


if __name__ == "__main__":
    main()
