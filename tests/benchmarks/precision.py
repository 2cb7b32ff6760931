"""
Where the tolerances come from: both ways to score, in every dtype, against float64.

    python -m tests.benchmarks.precision --model DIR [--data pairs.jsonl] [--pairs 8]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_refplug.bench.workloads import synthetic_pairs, tokenize_pairs, workload
from trl_refplug.data_files import read_pairs
from trl_refplug.rows import PaddedRows, Row
from trl_refplug.scoring import Scorer
from trl_refplug.scoring.exact import exact_log_probs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    if options.data:
        pairs = tokenize_pairs(read_pairs(options.data, options.pairs), AutoTokenizer.from_pretrained(options.model))
    else:
        pairs = synthetic_pairs(options.pairs, model.config.vocab_size)
    rows = workload("pairs", pairs, options.max_length).rows
    print("| dtype | compared | mean, nats a token | 99.9th percentile | largest | largest of a row's sum |")
    print("|---|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        rounded = model.to(dtype)
        reference = float64(rounded, rows)
        found = {"packed": packed(rounded, rows), "exact, batches of 16": exact(rounded, rows, 16)}
        found["exact, row by row"] = exact(rounded, rows, 1)
        for name, values in found.items():
            show(dtype, f"{name}, with float64", values, reference)
        show(dtype, "packed with exact, batches of 16", found["packed"], found["exact, batches of 16"])
        show(dtype, "exact: batches of 16 with row by row", found["exact, row by row"], found["exact, batches of 16"])


def show(dtype: torch.dtype, name: str, found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    tokens = torch.cat([(a.double() - b.double()).abs() for a, b in zip(found, expected, strict=True)])
    sums = max((a.double().sum() - b.double().sum()).abs() for a, b in zip(found, expected, strict=True))
    figures = " | ".join(f"{value:.1e}" for value in (tokens.mean(), tokens.quantile(0.999), tokens.max(), sums))
    print(f"| {str(dtype)[6:]} | {name} | {figures} |")


def packed(model: torch.nn.Module, rows: list[Row]) -> list[torch.Tensor]:
    answers = dict(Scorer(model, mode="packed").score_rows(rows))
    return [answers[index] for index in range(len(rows))]


def exact(model: torch.nn.Module, rows: list[Row], size: int) -> list[torch.Tensor]:
    answers: list[torch.Tensor] = []
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        padded = PaddedRows.flush_left(some)
        answers += map(torch.from_numpy, padded.values_by_row(exact_log_probs(model, padded.to_batch())))
    return answers


def float64(model: torch.nn.Module, rows: list[Row]) -> list[torch.Tensor]:
    """Row by row, log_softmax of the model's own logits; of the rounded weights, so that only computing differs."""
    import copy

    double = copy.deepcopy(model).double()
    double.__dict__.pop("forward", None)
    answers = []
    for row in rows:
        with torch.no_grad():
            logits = double(input_ids=torch.from_numpy(row.input_ids)[None]).logits[0]
        positions = torch.from_numpy(row.scored)
        values = logits[positions - 1].log_softmax(-1)
        answers.append(values.gather(1, torch.from_numpy(row.labels)[positions][:, None]).squeeze(1))
    return answers


if __name__ == "__main__":
    main()
