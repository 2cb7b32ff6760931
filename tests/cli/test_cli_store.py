"""`trl-refplug store info` and `store verify`, without a training command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from trl_refplug.cli.store import app
from trl_refplug.errors import StoreError
from trl_refplug.store import LogProbStore


@pytest.fixture
def path(tmp_path: Path) -> Path:
    for first, value in ((0, -1.0), (5, -1.5)):
        with LogProbStore(tmp_path / "store", mode="a", provenance={"model": f"m{first}"}) as store:
            store.put([bytes([first + i] * 16) for i in range(10)], [np.full(3, value, np.float32)] * 10)
    return tmp_path / "store"


def conflicting(path: Path) -> None:
    for number in range(2):
        other = path.with_name(f"other-{number}")
        with LogProbStore(other, mode="a") as store:
            store.put([b"." * 16], [np.full(3, -number, np.float32)])
        shutil.copytree(other, path, dirs_exist_ok=True)


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_info(path: Path) -> None:
    output = run("info", path)
    assert "15 rows, 45 log-probs in 2 shards" in output
    for part in ("10 rows", '"model": "m0"', "5 rows", '"model": "m5"'):
        assert part in output
    values = json.loads(run("info", path, "--json"))
    assert values["rows"] == 15
    assert [manifest["rows"] for manifest in values["manifests"]] == [10, 5]


def test_info_names_damaged_and_unfinished_files(path: Path) -> None:
    first, second = sorted(path.glob("*.json"))
    first.write_text("{}")
    second.unlink()
    (path / ".tmp-0").touch()
    output = run("info", path)
    assert f"damaged: {first.stem}: its manifest does not match its own checksum" in output
    assert "2 files of writers that did not finish" in output
    assert f".tmp-0, {second.stem}.arrow" in output


def test_verify(path: Path) -> None:
    assert "2 shards intact, 15 different rows, 0 more than once" in run("verify", path)
    conflicting(path)
    output = run("verify", path, code=1)
    assert f"conflict: row {(b'.' * 16).hex()} differs by 1 nats between shards" in output
    assert run("verify", path, "--tolerance", 2)
    victim = min(path.glob("*.arrow"))
    victim.write_bytes(victim.read_bytes()[:-1])
    output = run("verify", path, code=1)
    assert f"damaged: {victim.stem}: it has" in output
    values = json.loads(run("verify", path, "--json", code=1))
    assert not values["ok"]
    assert list(values["damaged"]) == [victim.stem]


def test_no_store(tmp_path: Path) -> None:
    for command in ("info", "verify"):
        with pytest.raises(StoreError, match="there is no store at"):
            CliRunner().invoke(app, [command, str(tmp_path / "nowhere")], catch_exceptions=False)
