"""
Finished runs of the scoring benchmark, in a file, so that an interrupted one goes on from them.

The file is a list of series: the facts that runs have in common, and the runs. Runs count only for a benchmark of the
very same facts, so timings of different things are never put together.
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import xxhash

import trl_refplug
from trl_refplug.bench.measure import MEASUREMENT, Run
from trl_refplug.bench.workloads import Workload
from trl_refplug.errors import ConfigurationError
from trl_refplug.models.causal_lm import causal_lm
from trl_refplug.runtime.files import write_atomically


Facts = dict[str, str | int | None]


def facts(model: Any, digest: str, workload: Workload, token_budget: int | None) -> Facts:
    """
    All that runs have to share to be put together.

    Args:
        digest (`str`): Of the model, as [`digest_model`] gives it.
        token_budget (`int`, *optional*): As in [`measure`].
    """
    inner = causal_lm(model)
    device = inner.get_input_embeddings().weight.device
    return {
        "shape": workload.shape,
        "rows": len(workload.rows),
        "tokens": _digest_rows(workload),  # of the data, the tokenizer, the way the pairs were drawn, the longest row
        "model": digest,
        "dtype": str(inner.dtype).removeprefix("torch."),
        "attention": inner.config._attn_implementation,
        "token budget": token_budget,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "machine": platform.node(),
        "measurement": MEASUREMENT,
        "trl-refplug": trl_refplug.__version__,
        **{package: version(package) for package in ("torch", "trl", "transformers")},
    }


def _digest_rows(workload: Workload) -> str:
    rows = [[row.input_ids.tolist(), row.labels.tolist()] for row in workload.rows]
    return xxhash.xxh3_128_hexdigest(json.dumps([rows, workload.batches]).encode())


@dataclass(frozen=True)
class Series:
    """Runs, oldest first, and the facts they have in common."""

    facts: Facts
    runs: list[Run]


class FinishedRuns:
    """
    The runs in a file, which need not be there yet.

    Raises:
        ConfigurationError: The file cannot be read, or is not such a file. It is left as it is.
    """

    def __init__(self, path: Path) -> None:
        import pydantic

        self.path = path
        self._all: list[Series] = []
        try:
            self._all = pydantic.TypeAdapter(list[Series]).validate_json(path.read_bytes(), strict=True)
        except FileNotFoundError:
            pass
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"])) or "the whole"
            raise ConfigurationError(
                f"{path} does not hold runs of this benchmark ({place}: {first['msg']}). Move it away to measure "
                "anew, or choose another --output."
            ) from None
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be read: {error}") from None

    def series(self, facts: Facts) -> Series:
        """The runs of just these facts; none, if there are none yet."""
        found = next((series for series in self._all if series.facts == facts), None)
        if found is None:
            found = Series(facts, [])
            self._all.append(found)
        return found

    def others_differ_in(self, facts: Facts) -> list[str]:
        """The facts in which the latest other runs of the same shape differ. Empty if there are no others."""
        others = [
            series.facts
            for series in self._all
            if series.runs and series.facts != facts and series.facts.get("shape") == facts["shape"]
        ]
        return [name for other in others[-1:] for name in facts if other.get(name) != facts[name]]

    def add(self, series: Series, run: Run) -> None:
        """Keep a run. Wherever the process is killed, the file holds all runs before it."""
        series.runs.append(run)
        values = [asdict(series) for series in self._all if series.runs]
        write_atomically(self.path, json.dumps(values, indent=1) + "\n")
