"""What `cached` costs: constructing, training, memory, filling. Prints; run with `-m benchmark -s`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from datasets import load_dataset
from transformers import PrinterCallback

from tests import tiny
from tests.trainers.runs import build
from trl_refplug import Capabilities, ReferenceIdentity, ReferenceProvider
from trl_refplug.models.traits import traits_of
from trl_refplug.providers.cached.filling import fill
from trl_refplug.providers.cached.missing_rows import find_missing
from trl_refplug.providers.cached.row_keys import RowKeys
from trl_refplug.scoring import Scorer
from trl_refplug.store import LogProbStore, ScoringFacts
from trl_refplug.trainers.planned_rows import planned_rows
from trl_refplug.trainers.trl_patch import PatchPoint


pytestmark = pytest.mark.benchmark

ROOT = Path(__file__).parents[2]
ROUNDS = 5
LARGER = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8}


class NoReference(ReferenceProvider):
    """Answers with zeros: what training costs without any reference."""

    capabilities = Capabilities(offline=True)

    def identity(self) -> ReferenceIdentity:
        return ReferenceIdentity("none", digest="0")

    def log_probs(self, batch: Any) -> torch.Tensor:
        return torch.zeros(len(batch.input_ids), batch.input_ids.shape[1] - 1)


def using(store: Path) -> dict[str, Any]:
    return {"ref_provider": "cached", "ref_provider_kwargs": {"path": str(store)}}


def preferences(path: Path, rows: int, *, times: int = 1, words: int = 1) -> Any:
    """`rows` different pairs, `times` over, read from a file so that TRL's tokenization is kept between runs."""
    with open(path, "w") as file:
        for row in list(tiny.preference_data(rows)) * times:
            texts = {name: row[name] * words for name in ("prompt", "chosen", "rejected")}
            file.write(json.dumps(texts) + "\n")
    return load_dataset("json", data_files=str(path), split="train", cache_dir=str(path.parent / "datasets"))


@pytest.mark.timeout(0)
def test_construction(tmp_path: Path) -> None:
    path, store = tiny.saved(tmp_path), tmp_path / "store"
    data = preferences(tmp_path / "data.jsonl", 5_000, times=20)
    seconds: dict[str, list[float]] = {"no reference": [], "cached": []}
    build("dpo", tmp_path, path, args=using(store), train_dataset=data)
    for _ in range(ROUNDS):
        for name, given in (("no reference", {"reference": NoReference()}), ("cached", {"args": using(store)})):
            started = time.perf_counter()
            build("dpo", tmp_path, path, train_dataset=data, **given)
            seconds[name].append(time.perf_counter() - started)
    for name, times in seconds.items():
        print(
            f"\nconstruction, {len(data):,} rows, {name}: {median(times):.2f} s ({min(times):.2f} to {max(times):.2f})"
        )


def test_share_of_a_step(tmp_path: Path) -> None:
    path, store = tiny.saved(tmp_path, **LARGER), tmp_path / "store"
    data = preferences(tmp_path / "data.jsonl", 64, words=6)
    args = {**using(store), "max_steps": 16, "per_device_train_batch_size": 4}
    trainer = build("dpo", tmp_path, path, args=args, train_dataset=data)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "ref/time_share" in entry]
    share, seconds = (median(entry[key] for entry in logs) for key in ("ref/time_share", "ref/time"))
    print(f"\n{seconds * 1e3:.2f} ms a step of 8 rows, {100 * share:.2f} % of it")


PEAK = """
import json, resource, sys
from pathlib import Path
from tests.benchmarks.test_cached import NoReference, preferences, using
from tests.trainers.runs import build
kind, out, model, store = sys.argv[1:]
data = preferences(Path(out) / "data.jsonl", 64, words=6)
given = {"reference": NoReference()} if kind == "none" else {}
args = {"max_steps": 6, **({} if given else using(Path(store)))}
if kind == "frozen":
    args = {"max_steps": 6, "ref_provider": "frozen"}
build("dpo", Path(out), model, args=args, train_dataset=data, **given).train()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.timeout(0)
def test_peak_memory(tmp_path: Path) -> None:
    path, store = tiny.saved(tmp_path, **LARGER, vocab_size=32_000), tmp_path / "store"
    peaks: dict[str, list[float]] = {"none": [], "cached": [], "frozen": []}
    for round_ in range(4):
        for kind in peaks if round_ else ("cached",):  # the first one fills
            out = tmp_path / kind
            out.mkdir(exist_ok=True)
            command = [sys.executable, "-c", PEAK, kind, str(out), path, str(store)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=dict(os.environ))
            if round_:
                peaks[kind].append(int(done.stdout.split()[-1]) / 1024)
    for kind, values in peaks.items():
        share = 100 * (median(values) / median(peaks["none"]) - 1)
        print(f"\npeak memory, reference {kind}: {median(values):,.0f} MiB ({share:+.1f} %)")


@pytest.mark.timeout(0)
def test_filling(tmp_path: Path) -> None:
    """The same rows through the scoring engine alone, and into a store, in turns."""
    trainer = build("dpo", tmp_path, tiny.saved(tmp_path, **LARGER), args={"ref_provider": "frozen"})
    trainer.train_dataset = build(
        "dpo", tmp_path, tiny.saved(tmp_path), train_dataset=preferences(tmp_path / "data.jsonl", 500, words=4)
    ).train_dataset
    model = trainer.model
    facts = ScoringFacts("benchmark", attention_implementation="sdpa", scoring_mode="packed")
    keys = RowKeys(facts, facts, traits_of(model))

    def blocks() -> Any:
        return map(keys.rows_of_plan, planned_rows(trainer, PatchPoint.find_in(type(trainer)), "train") or ())

    class Source:
        def bulk_scorer(self) -> Any:
            from contextlib import nullcontext

            return nullcontext(scorer)

    seconds: dict[str, list[float]] = {"scoring engine": [], "filling": []}
    for round_ in range(ROUNDS):
        for name in seconds:
            scorer = Scorer(model, mode="packed", token_budget=2048)
            started = time.perf_counter()
            if name == "filling":
                with LogProbStore(tmp_path / f"store-{round_}", mode="a") as store:
                    missing = find_missing(store, blocks(), keys)
                    fill(store, blocks, keys, missing, Source(), torch.device("cpu"), progress=False)
            else:
                rows = [block.row(index) for block in blocks() for index in range(len(block))]
                started = time.perf_counter()
                for _ in scorer.score_rows(rows):
                    pass
            seconds[name].append(time.perf_counter() - started)
    for name, times in seconds.items():
        share = 100 * (median(times) / median(seconds["scoring engine"]) - 1)
        print(f"\n{name}: {median(times):.2f} s ({share:+.1f} %)")
