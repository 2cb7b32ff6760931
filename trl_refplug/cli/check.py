"""`trl-refplug check`: tells whether a provider gives the declared reference's log-probs on your own data."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trl_refplug.arguments import ReferenceArguments
from trl_refplug.cli.checks import check_chat_template
from trl_refplug.cli.common import Dtype, torch_dtype
from trl_refplug.data_files import read_pairs
from trl_refplug.errors import ConfigurationError
from trl_refplug.plugins import check_reference_flags
from trl_refplug.runtime.names import check_name


if TYPE_CHECKING:
    from torch import Tensor

    from trl_refplug.models.tolerances import Tolerance
    from trl_refplug.provider import ReferenceBatch


_PAIRS_PER_BATCH = 4
_ROWS_SHOWN = 20


@dataclass(frozen=True)
class RowComparison:
    """
    One completion, scored by the provider and by the plain reference model.

    Args:
        line (`int`): Its line in the data file, counted from 1.
        completion (`str`): `"chosen"` or `"rejected"`.
        tokens (`int`): Number of scored tokens.
        provider, reference (`float`): Sum of the log-probs that each of them gives, in nats.
        largest (`float`): Largest absolute difference of any token, in nats.
        total (`float`): Sum of the absolute differences of all tokens, in nats.
    """

    line: int
    completion: str
    tokens: int
    provider: float
    reference: float
    largest: float
    total: float


@dataclass(frozen=True)
class Verdict:
    """All rows. The verdict is `ok` if the largest and the mean difference per token are within `tolerance`."""

    identity: str
    rows: list[RowComparison]
    tolerance: Tolerance

    @property
    def largest(self) -> float:
        return max(row.largest for row in self.rows)

    @property
    def mean(self) -> float:
        return sum(row.total for row in self.rows) / max(1, sum(row.tokens for row in self.rows))

    @property
    def ok(self) -> bool:
        return self.largest <= self.tolerance.largest and self.mean <= self.tolerance.mean


def check(
    model: Annotated[str, typer.Option(help="Directory or hub id of the policy.")],
    data: Annotated[
        Path,
        typer.Option(exists=True, dir_okay=False, help="JSON lines in TRL's format: prompt, chosen, rejected."),
    ],
    provider: Annotated[str, typer.Option(help="Name of the reference provider, as in ref_provider.")] = "auto",
    kwargs: Annotated[
        str | None,
        typer.Option(
            metavar="JSON", help="""Options of the provider, as in ref_provider_kwargs: '{"scoring": "packed"}'."""
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="Directory or hub id of the model that should be the reference. Default: --model."),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Number of pairs to score, from the start of the file.")] = 16,
    max_length: Annotated[int, typer.Option(min=2, help="Rows are cut to this many tokens, as in training.")] = 1024,
    dtype: Annotated[
        Dtype, typer.Option(help="Precision in which the policy is loaded: float32, bfloat16, float16.")
    ] = "float32",
    lora: Annotated[
        bool, typer.Option("--lora", help="Put a new LoRA adapter on the policy, as `--use_peft` does.")
    ] = False,
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0, help="Largest difference per token, in nats, that counts as rounding. Default: depends on --dtype."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison of all rows as JSON.")] = False,
) -> None:
    """
    Compare a provider's log-probs with those of the plain reference model, row by row.

    The data goes through the pipeline of the real trainer. The plain model is loaded in float32 and called as TRL
    calls its reference. The exit code is 0 if they agree, 1 if they differ, and 2 if the check cannot be made.
    """
    flags = ReferenceArguments(ref_provider=provider, ref_provider_kwargs=kwargs)
    check_reference_flags(flags, policy_is_peft=lora, peft_flag="--lora")
    pairs = read_pairs(data, rows)
    check_name("--model", model)
    if reference is not None:
        check_name("--reference", reference)
    if isinstance(pairs[0]["prompt"], list):
        check_chat_template("--model", model)

    from trl_refplug.models.tolerances import Tolerance, tolerance_for

    allowed = tolerance_for("no", torch_dtype(dtype), "cpu")
    if tolerance is not None:
        allowed = Tolerance(largest=tolerance, mean=tolerance)
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for the verdict only
        identity, batches, answers = _score(model, pairs, provider, kwargs, max_length, dtype, lora)
        plain = _score_plainly(reference or model, batches)
    verdict = Verdict(identity, _compare(batches, answers, plain), allowed)
    if as_json:
        typer.echo(
            json.dumps(
                {**asdict(verdict), "largest": verdict.largest, "mean": verdict.mean, "ok": verdict.ok}, indent=2
            )
        )
    else:
        _print(verdict, reference or model)
    if not verdict.ok:
        raise typer.Exit(1)


def _score(
    model: str, pairs: list[dict[str, Any]], provider: str, kwargs: str | None, max_length: int, dtype: str, lora: bool
) -> tuple[str, list[ReferenceBatch], list[Tensor]]:
    """
    Ask the provider, in a trainer that is built but does not train.

    Returns the identity of the reference, the batches, and the log-probs that the provider gave for each of them.
    """
    import torch
    from datasets import Dataset
    from peft import LoraConfig

    from trl_refplug import RefPlugDPOConfig, RefPlugDPOTrainer
    from trl_refplug.trainers.requested_batches import preference_requests

    with TemporaryDirectory() as directory:
        args = RefPlugDPOConfig(
            output_dir=directory,
            ref_provider=provider,
            ref_provider_kwargs=kwargs,
            ref_check="off",  # this command makes the same check, for every row
            max_length=max_length,
            model_init_kwargs={"dtype": dtype},
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
        )
        try:
            trainer: Any = RefPlugDPOTrainer(
                model=model,
                args=args,
                train_dataset=Dataset.from_list(pairs),
                peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
            )
        except OSError as error:  # transformers raises it if there is no such model
            raise ConfigurationError(f"--model {model}: {error}") from error
        if len(trainer.train_dataset) != len(pairs):
            raise ConfigurationError(
                f"TRL drops {len(pairs) - len(trainer.train_dataset)} of the {len(pairs)} pairs, as --max-length "
                f"{max_length} leaves nothing of their completions. Raise it, or remove these rows."
            )
        trainer.model.train()
        batches, answers = [], []
        for start in range(0, len(pairs), _PAIRS_PER_BATCH):
            columns = [trainer.train_dataset[row] for row in range(start, min(start + _PAIRS_PER_BATCH, len(pairs)))]
            [batch] = preference_requests(trainer.data_collator(columns))
            batch = batch.to(trainer.args.device)
            answer = trainer.ref_model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels, fused_lm_head=True
            )
            batches.append(batch.to("cpu"))
            answers.append(answer.log_probs.cpu())
        identity = str(trainer.ref_model.provider.identity())
        trainer.ref_model.provider.close()
    return identity, batches, answers


def _score_plainly(reference: str, batches: list[ReferenceBatch]) -> list[Tensor]:
    """Score the same batches with the plain reference model, in float32 and with TRL's own call."""
    import torch
    from transformers import AutoModelForCausalLM

    from trl_refplug.scoring.exact import ensure_fused_head, exact_log_probs

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32).eval().to(device)
    except OSError as error:
        raise ConfigurationError(f"--reference {reference}: {error}") from error
    ensure_fused_head(model, 1.0, False)
    return [exact_log_probs(model, batch.to(device)).cpu() for batch in batches]


def _compare(batches: list[ReferenceBatch], answers: list[Tensor], plain: list[Tensor]) -> list[RowComparison]:
    results, first = [], 1
    for batch, ours, theirs in zip(batches, answers, plain, strict=True):
        pairs = len(batch.input_ids) // 2
        for index, mask in enumerate(batch.labels[:, 1:] != -100):
            mine, plainly = ours[index][mask].double(), theirs[index][mask].double()
            off = (mine - plainly).abs()
            results.append(
                RowComparison(
                    line=first + index % pairs,
                    completion="chosen" if index < pairs else "rejected",
                    tokens=int(mask.sum()),
                    provider=mine.sum().item(),
                    reference=plainly.sum().item(),
                    largest=off.max().item() if off.numel() else 0.0,
                    total=off.sum().item(),
                )
            )
        first += pairs
    return sorted(results, key=lambda row: (row.line, row.completion))


def _print(verdict: Verdict, reference: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    worst = sorted(verdict.rows, key=lambda row: row.largest, reverse=True)[:_ROWS_SHOWN]
    title = "Log-probs in nats" + (
        f", the {_ROWS_SHOWN} rows that differ most" if len(verdict.rows) > _ROWS_SHOWN else ""
    )
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for name in ("Line", "Completion", "Tokens", "Provider", "Reference", "Largest difference"):
        table.add_column(name, justify="left" if name == "Completion" else "right")
    for row in sorted(worst, key=lambda row: (row.line, row.completion)):
        style = "" if row.largest <= verdict.tolerance.largest else "red"
        table.add_row(
            str(row.line),
            row.completion,
            str(row.tokens),
            f"{row.provider:.4f}",
            f"{row.reference:.4f}",
            f"{row.largest:.2g}",
            style=style,
        )
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    tolerance = verdict.tolerance
    console.print(
        f"{verdict.identity}\n{'gives' if verdict.ok else 'does not give'} the log-probs of {reference}: per token "
        f"they differ by up to {verdict.largest:.2g} nats (tolerance {tolerance.largest:g}) and by {verdict.mean:.2g} "
        f"on average (tolerance {tolerance.mean:g}), over {len(verdict.rows)} rows.",
        style="green" if verdict.ok else "red",
        markup=False,
    )
    if not verdict.ok:
        console.print(
            "Likely causes: another revision, precision or quantization of the model; another tokenizer or chat "
            "template; a reference that is not this model on purpose (then name it with --reference)."
        )
