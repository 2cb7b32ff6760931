"""Preference pairs of a file."""

import json
from pathlib import Path

import pytest

from trl_refplug.data_files import check_data_file, read_pairs
from trl_refplug.errors import ConfigurationError


def test_pairs_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path.write_text("".join(json.dumps({**pair, "source": number}) + "\n" for number in range(3)))
    assert read_pairs(path, 2) == [pair, pair]
    assert read_pairs(path, 9) == read_pairs(path, None) == [pair] * 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a", "chosen": "b"}', "line 1: found prompt, chosen; expected"),
        ("[]", "line 1: found list; expected"),
        ("{}", "line 1: found nothing; expected"),
        ('{"prompt": "a", "chosen": ["b"], "rejected": 1}', "found prompt of type str, .* rejected of type int"),
        ("no", "line 1: not JSON"),
        ("", "is empty"),
    ],
)
def test_a_file_without_pairs(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        read_pairs(tmp_path / "pairs.jsonl", 1)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary.jsonl").write_bytes(b"\xff")
    for name in ("binary.jsonl", "none.jsonl"):
        with pytest.raises(ConfigurationError, match=f"{name} cannot be read"):
            read_pairs(tmp_path / name, 1)


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
MESSAGES = {name: [{"role": "user", "content": text}] for name, text in PAIR.items()}


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("method", "name", "text", "conversational"),
    [
        ("dpo", "rows.jsonl", lines(PAIR, PAIR), False),
        ("dpo", "rows.jsonl", lines({"chosen": "ab", "rejected": "ac"}), False),
        ("dpo", "rows.jsonl", "\n" + lines(PAIR) + "\n", False),
        ("dpo", "rows.jsonl", lines(MESSAGES), True),
        ("dpo", "rows.json", json.dumps([PAIR, PAIR], indent=2), False),
        ("dpo", "rows.json", lines(MESSAGES, MESSAGES), True),
        ("dpo", "rows.csv", "id,prompt,chosen,rejected\n1,a,b,c\n", False),
        ("kto", "rows.jsonl", lines({"prompt": "a", "completion": "b", "label": True}), False),
        ("kto", "rows.jsonl", lines(PAIR), False),
        ("grpo", "rows.jsonl", lines({"prompt": MESSAGES["prompt"], "answer": 4}), True),
    ],
)
def test_data_of_a_method(method: str, name: str, text: str, conversational: bool, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert check_data_file(tmp_path / name, method) is conversational


@pytest.mark.parametrize(
    ("method", "name", "text", "message"),
    [
        (
            "dpo",
            "rows.jsonl",
            lines(PAIR, {**PAIR, "chosen": None}),
            "line 2: found prompt of type str, chosen of type N",
        ),
        ("dpo", "rows.jsonl", lines({**MESSAGES, "chosen": []}), "line 1: found an empty list as chosen"),
        ("dpo", "rows.jsonl", "\n" + lines(PAIR) + "{", "line 3: not JSON"),
        ("dpo", "rows.json", json.dumps([PAIR, {}]), "row 2: found nothing; expected TRL's preference format"),
        ("dpo", "rows.json", "[]", "is empty"),
        ("kto", "rows.jsonl", lines({"prompt": "a", "completion": "b"}), "line 1: found prompt, completion; expected"),
        ("rloo", "rows.jsonl", lines({"question": "a"}), "line 1: found question; expected TRL's prompt format"),
        ("dpo", "rows.csv", "", "is empty"),
    ],
)
def test_data_that_a_method_cannot_use(method: str, name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        check_data_file(tmp_path / name, method)


def test_only_the_first_rows_are_read_at_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(lines(*[PAIR] * 1000) + "{")
    assert not check_data_file(path, "dpo")
    with pytest.raises(ConfigurationError, match="line 1001: not JSON"):
        check_data_file(path, "dpo", None)
