"""A name that leads nowhere is answered at once, and one that may be on the hub is looked for there once."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import RepositoryNotFoundError

from trl_refplug.errors import ConfigurationError
from trl_refplug.runtime.names import check_name


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What the hub was asked for. It has `org/there`; for other names it answers what their last part says."""
    names = []

    class NoConnectionError(Exception):
        """Called as those of HTTP libraries are."""

    def repo_info(self: Any, name: str, *, repo_type: str, timeout: float) -> None:
        names.append((name, repo_type))
        if name == "org/unreachable":
            raise type("ConnectError", (NoConnectionError,), {})("no route to host")
        if name == "org/broken":
            raise RuntimeError("an answer that nobody understands")
        if name != "org/there":
            raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").touch()
    return names


def test_what_is_here_is_not_looked_for(asked: list[tuple[str, str]], tmp_path: Path) -> None:
    check_name("--model", "tiny")
    check_name("--model", str(tmp_path / "tiny"))
    (tmp_path / "hub" / "models--org--cached").mkdir(parents=True)
    check_name("--model", "org/cached")
    (tmp_path / "datasets" / "org___prepared").mkdir(parents=True)
    check_name("--data", "org/prepared", "dataset")
    check_name("--data", "s3://bucket/data", "dataset")
    assert asked == []


def test_the_hub_is_asked_once(asked: list[tuple[str, str]]) -> None:
    check_name("--model", "org/there")
    check_name("--model", "org/broken")  # loading it will say what is wrong
    with pytest.raises(ConfigurationError, match=r"Did you mean 'tiny'.* it does not exist either, or it is private"):
        check_name("--model", "tinny")
    with pytest.raises(ConfigurationError, match=r"the hub cannot be reached \(no route to host\)"):
        check_name("--data", "org/unreachable", "dataset")
    assert asked == [
        ("org/there", "model"),
        ("org/broken", "model"),
        ("tinny", "model"),
        ("org/unreachable", "dataset"),
    ]


@pytest.mark.parametrize("name", ["./tinny", "/no/where", "~/model", "a/b/c", "tinny/", "with space", "pairs.jsonl"])
def test_a_path_is_not_looked_for(name: str, asked: list[tuple[str, str]]) -> None:
    with pytest.raises(ConfigurationError, match=f"--model {name}: there is no such directory"):
        check_name("--model", name)
    assert asked == []
