import os
from pathlib import Path

import pytest

from trl_refplug.runtime.files import TEMPORARY_PREFIX, write_atomically


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("content", ["née\n", b"\x00\xff"])
def test_the_file_is_replaced_as_a_whole(tmp_path: Path, content: str | bytes, durable: bool) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    write_atomically(path, content, durable=durable)
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert os.listdir(tmp_path) == ["file"]


def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        assert source.name.startswith(TEMPORARY_PREFIX)
        raise OSError("No space left on device")

    path = tmp_path / "file"
    path.write_text("before")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "after")
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["file"]
