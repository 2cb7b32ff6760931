"""
Runs commands one after the other in one process, and tells what became of each.

    python -m tests.cli.wrong_commands COMMANDS.json RESULTS.json

COMMANDS.json has a list of argument lists. They run in the current directory. RESULTS.json gets a list of objects.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any


def tree() -> dict[str, float]:
    """All files and directories below the current directory, with the time of the last change of the files."""
    return {str(path): path.stat().st_mtime if path.is_file() else 0.0 for path in sorted(Path().rglob("*"))}


def run(arguments: list[str]) -> dict[str, Any]:
    """Run `trl-refplug` with these arguments. What processes print that it starts is captured, too."""
    from trl_refplug.cli.main import main

    before, loaded = tree(), set(sys.modules)
    sys.argv = ["trl-refplug", *arguments]
    kept = os.dup(1), os.dup(2)
    status: Any = 0
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        os.dup2(stdout.fileno(), 1)
        os.dup2(stderr.fileno(), 2)
        started = time.process_time()
        try:
            main()
        except SystemExit as error:
            status = error.code
        except BaseException:
            traceback.print_exc()
            status = "an exception"
        seconds = time.process_time() - started
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)
        stdout.seek(0)
        stderr.seek(0)
        return {
            "status": status,
            "stdout": stdout.read().decode(),
            "stderr": stderr.read().decode(),
            "seconds": seconds,
            "heavy": sorted({"torch", "trl", "transformers"} & (set(sys.modules) - loaded)),
            "left": sorted(set(tree().items()) ^ set(before.items())),
        }


if __name__ == "__main__":
    commands = json.loads(Path(sys.argv[1]).read_text())
    results = Path(sys.argv[2])
    results.write_text(json.dumps([run(command) for command in commands]))
