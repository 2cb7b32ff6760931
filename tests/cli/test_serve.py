"""`trl-refplug serve`: it prints a line when it serves, and a clear message if it cannot."""

import socket
import subprocess
import sys

import httpx
import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from trl_refplug.models.identity import digest_model

from .. import tiny
from ..serving.servers import ServerProcess
from .processes import run_here


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.saved(tmp_path_factory.mktemp("served"))


def test_help_shows_every_flag():
    shown = run_here("serve", "--help").stdout
    for flag in ("--dtype", "--device", "--scoring", "--token-budget", "--host", "--port", "--api-key-env"):
        assert flag in shown


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom trl_refplug.cli.main import app\n"
        "app(['serve', '--help'], standalone_mode=False)\n"
        "assert not {'torch', 'starlette', 'uvicorn', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_serves_a_base_and_its_adapter(tmp_path):
    path = str(tmp_path / "base")
    tiny.model().save_pretrained(path)  # there is no tokenizer beside it
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(path), LoraConfig(r=2, target_modules="all-linear"))
    model.save_pretrained(tmp_path)
    flags = ("--adapter", str(tmp_path), "--port", "0", "--scoring", "exact", "--api-key-env", "THE_KEY")
    with ServerProcess(path, *flags, THE_KEY="k1") as server:
        url = server.wait()
        assert httpx.get(f"{url}/v1/identity").status_code == 401
        facts = httpx.get(f"{url}/v1/identity", headers={"authorization": "Bearer k1"}).json()
        server.end()
        assert f"WARNING: {path} is served without a tokenizer" in server.process.stderr.read()
    assert facts["digest"] == digest_model(model, adapter="default")
    assert (facts["model"], facts["adapter"], facts["scoring"]) == (path, str(tmp_path), "exact")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such-model"], "MODEL no/such-model: there is no such directory. As a name on the hub,"),
        (["/no/such/directory"], "MODEL /no/such/directory: there is no such directory."),
        (
            ["m", "--api-key-env", "NO_SUCH_KEY"],
            "--api-key-env names the environment variable 'NO_SUCH_KEY', which",
        ),
        (["m", "--host", "192.0.2.1"], "Cannot listen on 192.0.2.1"),
        (["m", "--host", "no.such.host.invalid"], "Cannot listen on no.such.host.invalid"),
        (["m", "--port", "70000"], "65535"),
        (["m", "--scoring", "fast"], "--scoring"),
        (["m", "--token-budget", "0"], "--token-budget"),
        (["m", "--ssl-certfile", "/no/such/file"], "does not exist"),
        (["m", "--ssl-certfile", __file__], "are not a certificate chain and its private key, as PEM"),
        ([], "Missing argument"),
    ],
)
def test_what_cannot_be_served(arguments, message):
    result = run_here("serve", *arguments)
    assert result.returncode == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.stderr


def test_a_port_that_is_taken(path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run_here("serve", path, "--port", str(taken.getsockname()[1]))
    assert result.returncode == 2
    assert "Address already in use" in result.stderr
