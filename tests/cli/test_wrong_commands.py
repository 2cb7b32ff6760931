"""
Everyday mistakes, in every command. Each is answered in one line or a short list, with the right exit status, without
a traceback and without anything left behind. Where nothing has to be loaded, the answer comes at once.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.cli.processes import run_python


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
MESSAGES = {
    "prompt": [{"role": "user", "content": "a"}],
    "chosen": [{"role": "assistant", "content": "b"}],
    "rejected": [{"role": "assistant", "content": "c"}],
}
MODEL = ("--model_name_or_path", "tiny")
DATA = ("--dataset_name", "pairs.jsonl")
RUN = (*MODEL, *DATA, "--output_dir", "out", "--report_to", "none")
CPU = ("--use_cpu", "--bf16", "false")


@dataclass(frozen=True)
class Wrong:
    """A wrong command, a part of its message and its exit status."""

    name: str
    command: tuple[str, ...]
    message: str
    status: int = 2
    lines: int = 1  # of the error stream, at most


def kwargs(**options: Any) -> tuple[str, str]:
    return "--ref_provider_kwargs", json.dumps(options)


@dataclass(frozen=True)
class Reference:
    """The reference flags of a wrong training command."""

    name: str
    flags: tuple[str, ...]
    message: str
    lines: int = 1


REFERENCES = [
    Reference("provider", ("--ref_provider", "frozn"), "Did you mean 'frozen'?"),
    Reference("check", ("--ref_check", "maybe"), "must be one of error, warn, off, got 'maybe'"),
    Reference("check misspelt", ("--ref_check", "eror"), "Did you mean 'error'?"),
    Reference("negative prefetch", ("--ref_prefetch", "-1"), "must be a number of batches, 0 or more"),
    Reference("prefetch in words", ("--ref_prefetch", "many"), "--ref_prefetch many: expected a number of batches"),
    Reference("no JSON", ("--ref_provider_kwargs", "{model: x}"), "is not valid JSON", 2),
    Reference("no object", ("--ref_provider_kwargs", "[1]"), "must be a dictionary"),
    Reference("no value", ("--ref_provider",), "expected one argument."),
    Reference("option", ("--ref_provider", "frozen", *kwargs(modle="x")), "Did you mean 'model'?", 10),
    Reference("value of an option", ("--ref_provider", "frozen", *kwargs(scoring="fast")), "Option 'scoring'", 10),
    Reference("missing option", ("--ref_provider", "remote"), "Option 'url' is required", 12),
    Reference("model of an option", ("--ref_provider", "frozen", *kwargs(model="tinny")), "Did you mean 'tiny'?"),
    Reference("source", ("--ref_provider", "cached", *kwargs(source="frozn")), "Did you mean 'frozen'?"),
    Reference(
        "model of a source",
        ("--ref_provider", "cached", *kwargs(source="frozen", source_kwargs={"model": "tinny"})),
        "Did you mean 'tiny'?",
    ),
    Reference("no adapter", ("--ref_provider", "adapter"), "needs a PEFT policy. Add --use_peft, or use another"),
    Reference("no adapter of a source", ("--ref_provider", "cached", *kwargs(source="adapter")), "Add --use_peft"),
]


def data(name: str, file: str, message: str, method: str = "dpo") -> Wrong:
    return Wrong(f"data: {name}", (method, *MODEL, "--dataset_name", file), message)


LIGHT = [
    *(
        Wrong(f"reference: {case.name}", ("dpo", *RUN, *case.flags), case.message, 2, case.lines)
        for case in REFERENCES
    ),
    Wrong("reference: with dashes", ("dpo", *RUN, "--ref-provider=frozn"), "Did you mean 'frozen'?"),
    # The policy
    Wrong("model: none", ("dpo", *DATA), "No model: pass --model_name_or_path"),
    Wrong("model: misspelt", ("dpo", "--model_name_or_path", "tinny", *DATA), "Did you mean 'tiny'? As a name on the"),
    Wrong("model: no such path", ("dpo", "--model_name_or_path", "./nowhere", *DATA), "there is no such directory."),
    Wrong("model: a file", ("dpo", "--model_name_or_path", "pairs.jsonl", *DATA), "expected the directory of a model"),
    Wrong(
        "model: a directory above", ("dpo", "--model_name_or_path", "models", *DATA), "There are models in it: inner"
    ),
    Wrong("model: no name", ("dpo", "--model_name_or_path", "a/b/c", *DATA), "there is no such directory."),
    Wrong("model: with dashes", ("dpo", "--model-name-or-path", "tinny", "--dataset-name=x"), "Did you mean 'tiny'?"),
    # The data
    Wrong("data: none", ("dpo", *MODEL), "No data: pass --dataset_name"),
    data("misspelt", "pair.jsonl", "there is no such file or directory. Did you mean 'pairs.jsonl'?"),
    data("ending", "notes.txt", "expected a file that ends in .jsonl, .json, .parquet, .csv"),
    data("malformed", "malformed.jsonl", "malformed.jsonl, line 2: not JSON"),
    data("malformed array", "malformed.json", "malformed.json, line 1: not JSON"),
    data("empty", "empty.json", "empty.json is empty"),
    data("columns", "questions.jsonl", "line 1: found question, answer; expected TRL's preference format"),
    data("columns of KTO", "questions.jsonl", "line 1: found question, answer; expected TRL's format for KTO", "kto"),
    data("columns of GRPO", "questions.jsonl", "expected TRL's prompt format", "grpo"),
    data("columns of CSV", "questions.csv", "found question, answer; expected TRL's preference format"),
    data("no parquet", "no.parquet", "no.parquet cannot be read"),
    data("mixed types", "mixed.jsonl", "line 1: found prompt of type str, chosen of type list, rejected of type str"),
    data("empty directory", "nothing", "this directory is empty"),
    data("in a directory", "splits", "train.jsonl, line 2: not JSON"),
    data("conversations", "messages.jsonl", "the tokenizer of this model has no chat template"),
    Wrong("data: no evaluation", ("dpo", *RUN, "--eval_strategy", "steps"), "which has no evaluation split"),
    # Other flags of training
    Wrong("output: below a file", ("dpo", *RUN, "--output_dir", "pairs.jsonl/out"), "pairs.jsonl is a file"),
    Wrong("resume: nowhere", ("dpo", *RUN, "--resume_from_checkpoint", "run/checkpoint-9"), "There are checkpoint-2."),
    Wrong("resume: the run", ("dpo", *RUN, "--resume_from_checkpoint", "run"), "It contains checkpoint-2: name one"),
    Wrong("reward: GRPO", ("grpo", *RUN), "No reward: grpo needs --reward_funcs"),
    Wrong("reward: RLOO", ("rloo", *RUN), "No reward: rloo needs --reward_funcs"),
    Wrong("config: nowhere", ("dpo", "--config", "nowhere.yaml"), "--config nowhere.yaml cannot be read"),
    Wrong("config: a list", ("dpo", "--config", "list.yaml"), "found list; expected flags and their values"),
    Wrong("config: provider", ("dpo", "--config", "provider.yaml"), "Did you mean 'frozen'?"),
    # precompute
    Wrong("precompute: nothing", ("precompute",), "Found nothing; expected a method and its arguments"),
    Wrong("precompute: method", ("precompute", "dop"), "Did you mean 'dpo'?"),
    Wrong("precompute: GRPO", ("precompute", "grpo", *RUN), "generates its completions while it trains"),
    Wrong("precompute: RLOO", ("precompute", "rloo"), "generates its completions while it trains"),
    Wrong("precompute: provider", ("precompute", "dpo", *RUN, "--ref_provider", "frozen"), "needs the store of"),
    Wrong("precompute: columns", ("precompute", "dpo", *MODEL, "--dataset_name", "questions.jsonl"), "line 1: found"),
    # store
    *(
        Wrong(f"store {command}: {name}", ("store", command, path), message)
        for command in ("info", "verify")
        for name, path, message in (
            ("nowhere", "nowhere", "there is no store at 'nowhere'"),
            ("no store", "models", "'models' is no store"),
            ("empty", "nothing", "'nothing' is no store"),
        )
    ),
    Wrong("store verify: damaged", ("store", "verify", "damaged"), "", 1, 0),
    Wrong("store export: nowhere", ("store", "export", "nowhere", "t.csv", "--", "dpo", *RUN), "there is no store"),
    Wrong(
        "store export: ending", ("store", "export", "store", "t.xls", "--", "dpo", *RUN), "expected a file that ends"
    ),
    Wrong("store export: in use", ("store", "export", "store", "models", "--", "dpo", *RUN), "Name a new one"),
    Wrong("store export: method", ("store", "export", "store", "t.csv", "--", "sft"), "expected a method"),
    # ema
    Wrong("ema export: nowhere", ("ema", "export", "run/checkpoint-3", "new"), "Did you mean 'checkpoint-2'?"),
    Wrong("ema export: the run", ("ema", "export", "run", "new"), "It contains checkpoint-2: name one of them."),
    Wrong("ema export: no reference", ("ema", "export", "run/checkpoint-2", "new"), "there is nothing to export"),
    # check
    Wrong("check: data", ("check", "--model", "tiny", "--data", "questions.jsonl"), "line 1: found question, answer"),
    Wrong("check: chat template", ("check", "--model", "tiny", "--data", "messages.jsonl"), "has no chat template"),
    Wrong("check: model", ("check", "--model", "tinny", "--data", "pairs.jsonl"), "Did you mean 'tiny'?"),
    Wrong(
        "check: reference",
        ("check", "--model", "tiny", "--data", "pairs.jsonl", "--reference", "tinny"),
        "--reference tinny: there is no such directory. Did you mean 'tiny'?",
    ),
    Wrong(
        "check: provider", ("check", "--model", "tiny", "--data", "pairs.jsonl", "--provider", "frozn"), "Did you mean"
    ),
    Wrong(
        "check: adapter", ("check", "--model", "tiny", "--data", "pairs.jsonl", "--provider", "adapter"), "Add --lora"
    ),
    Wrong("check: no file", ("check", "--model", "tiny", "--data", "nowhere.jsonl"), "does not exist", 2, 8),
    # compare, demo, bench
    Wrong("compare: provider", ("compare", "--provider", "frozn"), "Did you mean 'frozen'?"),
    Wrong("compare: twice", ("compare", "--provider", "frozen", "--provider", "frozen"), "is given twice"),
    Wrong("compare: JSON", ("compare", "--provider", "ema={"), "is not valid JSON", 2, 2),
    Wrong("compare: data", ("compare", "--data", "malformed.jsonl"), "malformed.jsonl, line 2: not JSON"),
    Wrong("compare: model", ("compare", "--model", "tinny"), "Did you mean 'tiny'?"),
    Wrong("compare: chat template", ("compare", "--model", "tiny"), "has no chat template"),
    Wrong("compare: output", ("compare", "--output-dir", "pairs.jsonl"), "pairs.jsonl is a file"),
    Wrong("demo: provider", ("demo", "--ref-provider", "frozn"), "Did you mean 'frozen'?"),
    Wrong("demo: model", ("demo", "--model", "tinny"), "Did you mean 'tiny'?"),
    Wrong("bench: model", ("bench", "score", "--model", "tinny"), "Did you mean 'tiny'?"),
    # serve
    Wrong("serve: model", ("serve", "tinny"), "Did you mean 'tiny'?"),
    Wrong("serve: adapter", ("serve", "tiny", "--adapter", "models"), "no model was saved in this directory"),
    Wrong("serve: key", ("serve", "tiny", "--api-key-env", "NO_SUCH_VARIABLE"), "NO_SUCH_VARIABLE"),
    Wrong(
        "serve: certificate", ("serve", "tiny", "--ssl-keyfile", "pairs.jsonl"), "--ssl-keyfile needs --ssl-certfile"
    ),
    # new-plugin, and what typer answers
    Wrong("new-plugin: name", ("new-plugin", "My Plugin"), "Found provider name 'My Plugin'"),
    Wrong("new-plugin: taken", ("new-plugin", "frozen"), "is taken by trl-refplug itself"),
    Wrong("new-plugin: there", ("new-plugin", "mine", "--directory", "models"), "models exists already"),
    Wrong("command", ("pluggins",), "Did you mean 'plugins'", 2, 8),
    Wrong("option of a command", ("plugins", "--jsn"), "No such option: --jsn", 2, 8),
]
HEAVY = [
    Wrong("flag", ("dpo", *RUN, *CPU, "--lerning_rate", "1"), "Did you mean '--learning_rate'?"),
    Wrong(
        "value of a flag",
        ("dpo", *RUN, *CPU, "--max_steps", "many"),
        "invalid int value: 'many'.",
    ),
    Wrong("argument", ("dpo", *RUN, *CPU, "more"), "Unexpected argument 'more'"),
    Wrong("shape", ("bench", "score", "--model", "tiny", "--shape", "round"), "--shape round: expected one of"),
    Wrong(
        "unknown rows",
        ("store", "export", "store", "t.csv", "--", "dpo", *RUN, *CPU),
        "Either the store was filled for another model",
    ),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model, data of all kinds, a run and a store."""
    import numpy as np

    from trl_refplug.store import LogProbStore

    root = tmp_path_factory.mktemp("wrong")
    shutil.copytree(tiny.saved(tmp_path_factory.mktemp("models"), "llama"), root / "tiny")
    for template in (root / "tiny").glob("chat_template*"):
        template.unlink()
    for name in ("models/inner", "nothing", "splits", "run/checkpoint-2"):
        (root / name).mkdir(parents=True)
    (root / "models" / "inner" / "config.json").write_text("{}")
    (root / "run" / "checkpoint-2" / "trainer_state.json").write_text("{}")
    lines = {
        "pairs.jsonl": [PAIR] * 4,
        "messages.jsonl": [MESSAGES] * 4,
        "questions.jsonl": [{"question": "a", "answer": "b"}],
        "mixed.jsonl": [{**PAIR, "chosen": ["b"]}],
    }
    for name, rows in lines.items():
        (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("malformed.jsonl", "splits/train.jsonl"):
        (root / name).write_text(f"{json.dumps(PAIR)}\n{{prompt: a}}\n")
    (root / "malformed.json").write_text("[{,]")
    (root / "empty.json").touch()
    (root / "questions.csv").write_text("question,answer\na,b\n")
    (root / "no.parquet").write_text("text")
    (root / "notes.txt").write_text("text")
    (root / "list.yaml").write_text("- a\n")
    (root / "provider.yaml").write_text("model_name_or_path: tiny\nref_provider: frozn\n")
    for name in ("store", "damaged"):
        with LogProbStore(root / name, mode="a") as store:
            store.put([b"." * 16], [np.full(3, -1.0, np.float32)])
    [shard] = (root / "damaged").glob("*.arrow")
    shard.write_bytes(shard.read_bytes()[:-8])
    return root


def run_all(commands: list[Wrong], directory: Path, scratch: Path) -> dict[str, dict[str, Any]]:
    (scratch / "commands.json").write_text(json.dumps([list(wrong.command) for wrong in commands]))
    code = "import os, runpy; os.chdir({!r}); runpy.run_module('tests.cli.wrong_commands', run_name='__main__')"
    completed = run_python(
        sys.executable,
        "-c",
        code.format(str(directory)),
        str(scratch / "commands.json"),
        str(scratch / "results.json"),
        XDG_CACHE_HOME=str(scratch / "cache"),
        HF_DATASETS_CACHE=str(scratch / "datasets"),
    )
    assert completed.returncode == 0, completed.stderr
    results = json.loads((scratch / "results.json").read_text())
    return {wrong.name: result for wrong, result in zip(commands, results, strict=True)}


@pytest.fixture(scope="module")
def light(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return run_all(LIGHT, directory, tmp_path_factory.mktemp("light"))


@pytest.fixture(scope="module")
def heavy(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return run_all(HEAVY, directory, tmp_path_factory.mktemp("heavy"))


def check(wrong: Wrong, result: dict[str, Any], *, warned: bool = False) -> None:
    shown = f"{result['stdout']}\n{result['stderr']}"
    assert "Traceback" not in shown, shown
    assert result["status"] == wrong.status, shown
    assert wrong.message in " ".join(shown.replace("│", " ").split()), shown
    # Libraries may warn, and show their progress, before.
    answer = result["stderr"] if not warned else result["stderr"][result["stderr"].rindex("Error: ") :]
    assert len(answer.splitlines()) <= wrong.lines, shown
    assert result["left"] == []


@pytest.mark.parametrize("wrong", LIGHT, ids=lambda wrong: wrong.name)
def test_answered_at_once(wrong: Wrong, light: dict[str, dict[str, Any]]) -> None:
    result = light[wrong.name]
    check(wrong, result)
    assert result["heavy"] == []  # it imports neither torch nor TRL
    assert result["seconds"] < 2


@pytest.mark.parametrize("wrong", HEAVY, ids=lambda wrong: wrong.name)
def test_answered(wrong: Wrong, heavy: dict[str, dict[str, Any]]) -> None:
    check(wrong, heavy[wrong.name], warned=True)


def test_there_are_fifty() -> None:
    names = [wrong.name for wrong in LIGHT + HEAVY]
    assert len(names) == len(set(names)) >= 50


@pytest.mark.parametrize("command", [["dpo", "--ref_provider", "frozn"], ["store", "info", "nowhere"]])
def test_a_traceback_on_request_changes_no_status(command: list[str]) -> None:
    done = run_python(sys.executable, "-m", "trl_refplug", *command, TRL_REFPLUG_TRACEBACK="1")
    assert "Traceback" in done.stderr
    assert done.returncode == 2


def test_help_of_precompute_is_help() -> None:
    done = run_python(sys.executable, "-m", "trl_refplug", "precompute", "--help")
    assert done.returncode == 0
    assert "Score the rows of a training run" in done.stdout
    assert done.stderr == ""


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    from trl_refplug.runtime.files import written_aside

    (tmp_path / "table.csv").write_text("before")

    def write(target: Path) -> None:
        with written_aside(target) as path:
            if target.suffix:
                path.write_text("half")
            else:
                path.mkdir()
                (path / "weights").write_text("half")
            raise OSError(28, "full")

    for name in ("table.csv", "model"):
        with pytest.raises(OSError, match="full"):
            write(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]
    assert (tmp_path / "table.csv").read_text() == "before"
