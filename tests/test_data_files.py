"""Preference pairs of a file."""

import json
from pathlib import Path

import pytest

from trl_refplug.data_files import read_pairs
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
