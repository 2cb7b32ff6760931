"""`trl-refplug bench score` on a tiny model."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from tests.cli.processes import ROOT
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
    assert columns[4] == str(scored)  # the four pairs are the same: what they share is scored once


def test_data_in_another_format_is_told(model, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(
        ConfigurationError, match=r"line 1: found the columns prompt, completion.*chosen, rejected missing"
    ):
        run("--model", model, "--data", str(data))


@pytest.mark.parametrize("kind", ["file", "read-only"])
def test_an_output_that_cannot_be_written_to_is_told(tmp_path, kind):
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
        (("--dtype", "fp32"), "expected a floating-point torch dtype"),
        (("--shape", "grpo", "--max-length", "512"), "raise --max-length"),
    ],
)
def test_wrong_options_are_told(model, arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        run("--model", model, *arguments)


def series(output):
    """What is kept of one shape's runs."""
    [only] = json.loads((output / "score.json").read_text())
    return only


def interrupted(model, output, sent):
    """The exit code and messages of an endless benchmark that a signal ended after its first run."""
    flags = ["--model", model, "--rows", "4", "--shape", "pairs", "--repeats", "1000000", "--output", str(output)]
    process = subprocess.Popen(
        [sys.executable, "-m", "trl_refplug", "bench", "score", *flags],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 200
        while not (output / "score.json").exists():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(sent)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, stderr


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT and SIGKILL")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL], ids=["SIGINT", "SIGKILL"])
def test_it_goes_on_where_it_was_interrupted(model, tmp_path, sent):
    code, stderr = interrupted(model, tmp_path, sent)
    assert "Traceback" not in stderr
    assert "pairs, run 1 of 1000000, TRL's way:" in stderr
    assert "pairs, run 1 of 1000000, packed:" in stderr
    if sent == signal.SIGINT:
        assert code == 130
        last = stderr.splitlines()[-1]
        assert last == (
            f"Interrupted. The runs that have finished are kept in {tmp_path}: the same command goes on from there."
        )

    before = series(tmp_path)
    kept = len(before["runs"])
    old = tmp_path / "old.json"
    os.link(tmp_path / "score.json", old)
    whole = old.read_bytes()
    result = run("--model", model, "--shape", "pairs", "--repeats", str(kept + 2), "--output", str(tmp_path))
    assert old.read_bytes() == whole  # replaced, not written over: a process killed while it writes breaks nothing
    after = series(tmp_path)
    assert after["facts"] == before["facts"]
    assert after["runs"][:kept] == before["runs"]
    assert len(after["runs"]) == kept + 2
    assert f"pairs: {kept} run{'s' if kept > 1 else ''} kept from before, 2 to go\n" in result.stderr
    assert f"pairs, run {kept + 1} of {kept + 2}: TRL" in result.stderr
    assert f"pairs, run {kept} of" not in result.stderr
    assert f"Medians of {kept + 2} alternating runs" in result.stdout
    assert result.stderr.splitlines()[-1].startswith("Measured 2 runs (32 rows) in 00:")


@pytest.fixture(scope="module")
def measured(model, tmp_path_factory):
    """A folder with a finished benchmark."""
    output = tmp_path_factory.mktemp("measured")
    result = run("--model", model, "--shape", "pairs", "--repeats", "2", "--output", str(output))
    (output / "stderr").write_text(result.stderr)
    return output


@pytest.fixture
def output(measured, tmp_path):
    (tmp_path / "score.json").write_bytes((measured / "score.json").read_bytes())
    return tmp_path


def test_what_has_finished_is_not_measured_again(model, measured, output):
    result = run("--model", model, "--shape", "pairs", "--repeats", "2", "--output", str(output))
    assert "pairs: 2 runs kept from before, 0 to go" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("Measured 0 runs (0 rows)")
    assert (output / "score.json").read_bytes() == (measured / "score.json").read_bytes()
    assert (output / "score.md").read_text() == (measured / "score.md").read_text()
    assert (output / "score.png").exists()


def test_each_way_is_first_in_turn(measured):
    told = (measured / "stderr").read_text()
    first, second = (
        [told.index(f"run {number} of 2, {way}") for way in ("TRL's way", "packed")] for number in (1, 2)
    )
    assert first == sorted(first)
    assert second == sorted(second, reverse=True)


def test_fewer_runs_than_the_others_are_told(model, output):
    shapes = ("--shape", "unshared", "--shape", "pairs")
    table = run("--model", model, *shapes, "--output", str(output)).stdout
    assert "Medians of 2 alternating runs" in table
    assert "| unshared, 8 (1 run) |" in table
    assert "| pairs, 8 |" in table


@pytest.fixture(scope="module")
def other_model(model, tmp_path_factory):
    """One with other weights."""
    directory = tmp_path_factory.mktemp("other")
    other = tiny("llama")
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    other.save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (("--rows", "3"), "rows, tokens"),
        (("--max-length", "100"), "tokens"),
        (("--token-budget", "512"), "token budget"),
        (("--dtype", "bfloat16"), "model, dtype"),
        ("model", "model"),
        ("data", "tokens"),
        ("threads", "threads"),
        ("torch", "torch"),
        ("trl", "trl"),
        ("transformers", "transformers"),
        ("trl-refplug", "trl-refplug"),
        ("measurement", "measurement"),
    ],
    ids=str,
)
def test_runs_of_something_else_are_left_alone(model, other_model, output, monkeypatch, request, other, told):
    arguments = ["--model", other_model if other == "model" else model, "--shape", "pairs", "--output", str(output)]
    before = series(output)
    if other == "data":
        data = output / "data.jsonl"
        data.write_text("".join(json.dumps(PLAIN) + "\n" for _ in range(4)))
        arguments += ["--data", str(data)]
    elif other == "threads":
        threads = torch.get_num_threads()
        request.addfinalizer(lambda: torch.set_num_threads(threads))
        torch.set_num_threads(threads + 1)
    elif other in before["facts"] and other != "model":  # measured by another release
        before["facts"][other] = "0.0"
        (output / "score.json").write_text(json.dumps([before]))
    elif isinstance(other, tuple):
        arguments += other
    result = run(*arguments)
    assert f"pairs: measured anew; the runs in {output / 'score.json'} differ in {told}\n" in result.stderr
    assert "Medians of 1 alternating runs" in result.stdout
    kept, added = json.loads((output / "score.json").read_text())
    assert kept == before
    assert len(added["runs"]) == 1


@pytest.mark.parametrize("damage", [lambda text: text[: len(text) // 2], lambda text: "{}", lambda text: ""])
def test_a_file_that_is_not_its_own_is_left_as_it_is(model, output, damage):
    path = output / "score.json"
    path.write_text(damage(path.read_text()))
    before = path.read_bytes()
    with pytest.raises(
        ConfigurationError, match=r"score.json does not hold runs of this benchmark .* another --output"
    ):
        run("--model", model, "--shape", "pairs", "--output", str(output))
    assert path.read_bytes() == before


def test_a_run_that_lacks_a_figure_is_told(model, output):
    kept = series(output)
    del kept["runs"][1]["seconds"]
    (output / "score.json").write_text(json.dumps([kept]))
    with pytest.raises(ConfigurationError, match=r"0\.runs\.1\.seconds: Field required"):
        run("--model", model, "--shape", "pairs", "--output", str(output))


def test_every_figure_of_a_run_is_kept(output):
    for kept in series(output)["runs"]:
        assert set(kept) == {field.name for field in fields(Run)}
        assert all(kept[name] > 0 for name in ("trl_seconds", "seconds", "matmul_rate", "operations"))
        assert 0 <= kept["difference"] < 1e-3


def test_a_model_that_cannot_be_packed_is_told(tmp_path):
    directory = tmp_path / "model"
    tiny("bloom").save_pretrained(directory)
    with pytest.raises(ConfigurationError, match="Nothing of shape 'pairs' can be packed, because of ALiBi"):
        run("--model", str(directory), "--shape", "pairs", "--output", str(tmp_path))


def test_help_needs_no_torch():
    code = "import sys, trl_refplug.cli.bench; sys.exit(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip() == "[]"
