"""
Processes that fill a store through a trainer.

Run as a program, this is a server that has imported everything, and reads commands line by line. `fill`, followed by
arguments, forks a process that fills a store, and is answered with the id of that process. `wait`, followed by such an
id, is answered with the exit status of the process.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
import warnings
from pathlib import Path

import trl_refplug.scoring.scorer as scorer
import trl_refplug.store
from tests import tiny
from tests.trainers.runs import build


ROWS = 150
SHARD_ROWS = 40


def fill(model: str, store: str, out: str, log: str | None = None) -> None:
    """
    Build a trainer that fills `store`, in forward passes of a few rows. If `log` is given, the number of rows is
    written into that file whenever the rows of a pass were stored.
    """
    warnings.simplefilter("ignore")
    logging.disable()
    real = trl_refplug.store.LogProbStore

    class Logged(real):  # type: ignore[valid-type, misc]
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, publish_rows=SHARD_ROWS, **kwargs)

        def put(self, keys: list[bytes], rows: list[object]) -> None:
            super().put(keys, rows)
            if log is not None:
                with open(log, "ab", buffering=0) as file:
                    os.write(file.fileno(), b"".join(keys))

    trl_refplug.store.LogProbStore = Logged  # type: ignore[misc]
    scorer.TOKEN_BUDGET["cpu"] = 128
    args = {"ref_provider": "cached", "ref_provider_kwargs": {"path": store}}
    build("dpo", Path(out), model, args=args, train_dataset=tiny.preference_data(ROWS))


def serve() -> None:
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        if command == "wait":
            answer = os.waitstatus_to_exitcode(os.waitpid(arguments[0], 0)[1])
        else:
            answer = os.fork()
            if not answer:
                try:
                    fill(*arguments)
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
        print(answer, flush=True)


if __name__ == "__main__":
    serve()
