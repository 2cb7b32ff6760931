"""`trl-refplug bench score` on a tiny model."""

import json
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from tests.cli.processes import running
from tests.scoring.models import tiny
from trl_refplug.bench.measure import Run
from trl_refplug.cli.bench import app
from trl_refplug.errors import ConfigurationError


WORDS = ["<pad>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
TEMPLATE = (
    "{% for m in messages %}{{ m.role[:1] }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}a {% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    tiny("llama").save_pretrained(directory)
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="z"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return str(directory)


def run(*arguments):
    return CliRunner().invoke(app, ["score", "--repeats", "1", "--rows", "4", *arguments], catch_exceptions=False)


def test_it_runs_without_data(model, tmp_path):
    result = run("--model", model, "--output", str(tmp_path))
    assert result.exit_code == 0
    table = (tmp_path / "score.md").read_text()
    assert table in result.stdout
    for shape in ("pairs, 8", "long-prompt, 8", "grpo, 8", "unshared, 8"):
        assert f"| {shape} |" in table
    assert (tmp_path / "score.png").read_bytes().startswith(b"\x89PNG")


def turn(role, content):
    return [{"role": role, "content": content}]


PLAIN = {"prompt": "a b c d e f g h", "chosen": " i j", "rejected": " k l m"}
CHAT = {
    "prompt": turn("user", "b c d e f g"),
    "chosen": turn("assistant", "i j k"),
    "rejected": turn("assistant", "l m"),
}


@pytest.mark.parametrize(("example", "scored"), [(PLAIN, 3 + 4), (CHAT, 3 + 2)])
def test_it_takes_preference_data(model, tmp_path, example, scored):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(example) + "\n" for _ in range(4)))
    result = run("--model", model, "--data", str(data), "--shape", "pairs", "--output", str(tmp_path))
    columns = [column.strip() for column in result.stdout.strip().splitlines()[-1].split("|")]
    assert columns[1] == "pairs, 8"
    assert columns[4] == str(scored)  # the four pairs are the same, so each token of theirs is scored only once


def test_data_in_another_format_is_refused(model, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(ConfigurationError, match="line 1: found prompt, completion; expected TRL's preference format"):
        run("--model", model, "--data", str(data))


@pytest.mark.parametrize("kind", ["file", "read-only"])
def test_an_output_that_cannot_be_written_to_is_refused(tmp_path, kind):
    output = tmp_path / "file"
    output.touch()
    if kind == "read-only":
        output = Path("/proc/self")
        if not output.exists():
            pytest.skip("no /proc")
    with pytest.raises(ConfigurationError, match=r"--output .* cannot be written to"):
        run("--model", "no/model", "--output", str(output))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shape", "grop"), "Did you mean 'grpo'"),
        (("--shape", "grpo", "--max-length", "512"), "raise --max-length"),
    ],
)
def test_wrong_options_are_refused(model, arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        run("--model", model, *arguments)


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_a_wrong_dtype_is_refused(dtype):
    result = run("--model", "no/model", "--dtype", dtype)
    assert result.exit_code == 2
    assert f"'{dtype}' is not one of" in result.stderr


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigurationError, match=r"needs matplotlib: pip install 'trl-refplug\[demo\]'"):
        run("--model", "no/model")


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_an_interrupted_benchmark_leaves_the_figures_of_its_finished_runs(model, tmp_path):
    flags = ["--model", model, "--rows", "4", "--shape", "pairs", "--repeats", "1000000", "--output", str(tmp_path)]
    written = (tmp_path / "score.md").exists  # it is written after score.json
    threads = str(torch.get_num_threads())
    with running("-m", "trl_refplug", "bench", "score", *flags, until=written, OMP_NUM_THREADS=threads) as process:
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert "Traceback" not in stderr
    assert "pairs, run 1 of 1000000, TRL's way:" in stderr
    assert "pairs, run 1 of 1000000, packed:" in stderr
    assert process.returncode == 130
    last = stderr.splitlines()[-1]
    assert last == f"Interrupted. If a run has finished, its figures are in {tmp_path}: score.md, score.json."
    [result] = json.loads((tmp_path / "score.json").read_text())
    assert len(result["runs"]) >= 1
    assert "| pairs, 8 |" in (tmp_path / "score.md").read_text()


@pytest.fixture(scope="module")
def two_runs(model, tmp_path_factory):
    """The directory and the messages of a benchmark of two runs."""
    output = tmp_path_factory.mktemp("two-runs")
    return output, run("--model", model, "--shape", "pairs", "--repeats", "2", "--output", str(output)).stderr


def test_the_two_ways_take_turns_in_being_the_first(two_runs):
    _, said = two_runs
    first, second = ([said.index(f"run {number} of 2, {way}") for way in ("TRL's way", "packed")] for number in (1, 2))
    assert first == sorted(first)
    assert second == sorted(second, reverse=True)
    assert said.splitlines()[-1].startswith("Scored 32 rows in 00:")


def test_every_figure_of_every_run_is_written(two_runs):
    output, _ = two_runs
    [result] = json.loads((output / "score.json").read_text())
    assert (result["shape"], result["rows"], len(result["runs"])) == ("pairs", 8, 2)
    for figures in result["runs"]:
        assert set(figures) == {field.name for field in fields(Run)}
        assert all(figures[name] > 0 for name in ("trl_seconds", "seconds", "matmul_rate", "operations"))
        assert 0 <= figures["difference"] < 1e-3


def test_results_of_an_earlier_benchmark_are_replaced(model, tmp_path):
    for name in ("score.md", "score.json"):
        (tmp_path / name).write_text("earlier")
    result = run("--model", model, "--shape", "pairs", "--output", str(tmp_path))
    assert (tmp_path / "score.md").read_text() in result.stdout
    [kept] = json.loads((tmp_path / "score.json").read_text())
    assert len(kept["runs"]) == 1


def test_a_model_that_cannot_be_packed_is_refused(tmp_path):
    directory = tmp_path / "model"
    tiny("bloom").save_pretrained(directory)
    with pytest.raises(ConfigurationError, match="Nothing of shape 'pairs' can be packed, because of ALiBi"):
        run("--model", str(directory), "--shape", "pairs", "--output", str(tmp_path))


def test_help_needs_no_torch():
    code = "import sys, trl_refplug.cli.bench; sys.exit(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip() == "[]"
