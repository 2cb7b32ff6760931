"""`trl-refplug check`, which compares a provider with the plain reference model on the user's own data."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from tests import tiny
from tests.cli.processes import run_here, run_python
from tests.conftest import FakeSite
from trl_refplug.cli.main import app
from trl_refplug.errors import ConfigurationError, RefPlugError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.saved(tmp_path_factory.mktemp("models"))


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "pairs.jsonl"
    tiny.preference_data(6).to_json(path)
    return str(path)


def check(*arguments):
    """Run the command. Returns its exit code and its verdict."""
    outcome = CliRunner().invoke(app, ["check", *arguments, "--json"])
    if isinstance(outcome.exception, RefPlugError):
        raise outcome.exception
    return outcome.exit_code, json.loads(outcome.stdout)


@pytest.mark.parametrize(
    "provider",
    [
        [],
        ["--provider", "frozen", "--kwargs", '{"scoring": "packed"}'],
        ["--lora"],
        ["--provider", "ema"],
        ["--provider", "cached"],
    ],
    ids=" ".join,
)
def test_the_built_in_providers_give_the_policys_log_probs(provider, model, data, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    code, verdict = check("--model", model, "--data", data, *provider)
    assert code == 0
    assert verdict["ok"]
    assert verdict["largest"] < 1e-4
    assert [(row["line"], row["completion"]) for row in verdict["rows"]] == [
        (line, completion) for line in range(1, 7) for completion in ("chosen", "rejected")
    ]
    assert all(row["tokens"] > 0 and row["reference"] < -1 for row in verdict["rows"])


def test_rows(model, data):
    assert len(check("--model", model, "--data", data, "--rows", "5")[1]["rows"]) == 10


def test_another_model_is_reported(model, data, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        other.get_input_embeddings().weight[10:].mul_(1.05)
    other.save_pretrained(tmp_path / "other")
    named = ["--provider", "frozen", "--kwargs", json.dumps({"model": str(tmp_path / "other")})]
    code, verdict = check("--model", model, "--data", data, *named)
    assert code == 1
    assert not verdict["ok"]
    for row in verdict["rows"]:
        assert row["largest"] <= row["total"]
        assert abs(row["provider"] - row["reference"]) <= row["total"] + 1e-4
    # If that model is declared to be the reference, the same log-probs are right.
    code, verdict = check("--model", model, "--data", data, *named, "--reference", str(tmp_path / "other"))
    assert code == 0
    assert verdict["largest"] < 1e-4


def test_low_precision_has_its_own_tolerance(model, data):
    code, verdict = check("--model", model, "--data", data, "--dtype", "bfloat16")
    assert code == 0
    assert 1e-3 < verdict["largest"] < verdict["tolerance"]["largest"] == 1.0
    code, verdict = check("--model", model, "--data", data, "--dtype", "bfloat16", "--tolerance", "0.0001")
    assert code == 1


def test_table(model, data):
    good = CliRunner().invoke(app, ["check", "--model", model, "--data", data])
    assert good.exit_code == 0
    assert "gives the log-probs of" in good.output
    assert "frozen[" in good.output
    assert good.output.count("chosen") == 6
    bad = CliRunner().invoke(
        app, ["check", "--model", model, "--data", data, "--tolerance", "0", "--dtype", "bfloat16"]
    )
    assert bad.exit_code == 1
    assert "does not give" in bad.output


def test_a_plugins_provider_that_is_not_what_it_says(model, data, site: FakeSite):
    """The command runs in a process of its own. Whatever the plugin prints, its standard output is only JSON."""
    source = """
        from trl_refplug import Capabilities, ReferenceIdentity, ReferenceProvider, hookimpl

        class Provider(ReferenceProvider):
            starts_as_policy = True

            def identity(self):
                return ReferenceIdentity("constant", "0")

            def log_probs(self, batch):
                print("scoring")
                return (batch.labels[:, 1:] != -100).float() * -3.0

        @hookimpl
        def refplug_register_providers(register):
            register("constant", Provider)
    """
    site.install("acme-refs", plugins={"acme": "acme_mod"}, modules={"acme_mod": source})
    path = ":".join([str(site.path), *sys.path])
    done = run_here(
        "check",
        "--model",
        model,
        "--data",
        data,
        "--provider",
        "constant",
        "--json",
        PYTHONPATH=path,
        HF_HUB_OFFLINE="1",
    )
    assert done.returncode == 1, done.stderr
    row = json.loads(done.stdout)["rows"][0]
    assert row["provider"] == pytest.approx(-3.0 * row["tokens"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--provider", "frosen"], "Did you mean 'frozen'"),
        (["--kwargs", '{"modle": 1}'], "modle"),
        (["--kwargs", "{"], "not valid JSON"),
        (["--provider", "adapter"], "PEFT"),
        (["--reference", "no/such-model"], "--reference no/such-model"),
        (["--max-length", "2"], "--max-length 2"),
    ],
)
def test_what_cannot_be_checked_is_an_error(arguments, message, model, data):
    with pytest.raises(RefPlugError, match=message):
        check("--model", model, "--data", data, *arguments)


def test_a_wrong_dtype_is_an_error(data):
    outcome = CliRunner().invoke(app, ["check", "--model", "no/model", "--data", data, "--dtype", "int8"])
    assert outcome.exit_code == 2
    assert "'int8' is not one of" in outcome.stderr


@pytest.mark.parametrize(
    ("text", "message"), [("", "is empty"), ('{"prompt": "a"}\n', "line 1"), ("{\n", "line 1"), ("[]\n", "line 1")]
)
def test_data_must_be_preference_pairs(text, message, model, tmp_path):
    (tmp_path / "data.jsonl").write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        check("--model", model, "--data", str(tmp_path / "data.jsonl"))


def test_errors_end_with_2(data):
    done = run_here("check", "--model", "no/such-model", "--data", data, HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert "--model no/such-model" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_loads_nothing_heavy():
    code = """
import sys
from typer.testing import CliRunner
from trl_refplug.cli.main import app
outcome = CliRunner().invoke(app, ["check", "--help"])
assert outcome.exit_code == 0 and "--tolerance" in outcome.output
print({"torch", "trl", "transformers", "datasets"} & set(sys.modules))
"""
    assert run_python(sys.executable, "-c", code).stdout.strip() == "set()"
