"""`trl-refplug bench score` on a tiny model."""

import json
import subprocess
import sys

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from tests.scoring.models import tiny
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


def test_help_needs_no_torch():
    code = "import sys, trl_refplug.cli.bench; sys.exit(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip() == "[]"
