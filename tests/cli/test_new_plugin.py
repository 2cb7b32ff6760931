"""`trl-refplug new-plugin`, whose package can be installed, tested and used without changes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.cli.processes import environment_with, run_here, run_python
from trl_refplug.cli.main import app
from trl_refplug.errors import ConfigurationError


NAMES = {"tempered": ("refplug_tempered", "TemperedProvider"), "my-own_2": ("refplug_my_own_2", "MyOwn2Provider")}


def write_plugin(name: str, directory: Path) -> Path:
    target = directory / f"refplug-{name}"
    outcome = CliRunner().invoke(app, ["new-plugin", name, "--directory", str(target)], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    return target


@pytest.mark.parametrize("name", NAMES)
def test_every_file_has_the_new_names(name: str, tmp_path: Path) -> None:
    target = write_plugin(name, tmp_path)
    module, provider = NAMES[name]
    texts = {str(path.relative_to(target)): path.read_text() for path in target.rglob("*") if path.is_file()}
    files = {"pyproject.toml", "README.md", "tests/test_provider.py"}
    assert texts.keys() == files | {
        f"{module}/{file}" for file in ("__init__.py", "options.py", "provider.py", "py.typed")
    }
    assert "example" not in "".join(texts.values()).lower()
    assert f"class {provider}(ReferenceProvider)" in texts[f"{module}/provider.py"]
    assert f'target = "{module}.provider:{provider}"' in texts[f"{module}/__init__.py"]
    assert f'register("{name}", target, ' in texts[f"{module}/__init__.py"]
    assert f'{name} = "{module}"' in texts["pyproject.toml"]


def test_default_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = CliRunner().invoke(app, ["new-plugin", "tempered"])
    assert (tmp_path / "refplug-tempered" / "pyproject.toml").is_file()
    assert "pip install -e 'refplug-tempered[test]'" in outcome.output


@pytest.mark.parametrize("name", ["Uniform", "2fast", "a b", "../up", "frozen", "auto"])
def test_names_that_cannot_be_registered_are_refused(name: str, tmp_path: Path) -> None:
    outcome = CliRunner().invoke(app, ["new-plugin", name, "--directory", str(tmp_path / "new")])
    assert isinstance(outcome.exception, ConfigurationError)
    assert repr(name) in str(outcome.exception)
    assert not (tmp_path / "new").exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    target = write_plugin("tempered", tmp_path)
    (target / "README.md").write_text("mine")
    outcome = CliRunner().invoke(app, ["new-plugin", "tempered", "--directory", str(target)])
    assert isinstance(outcome.exception, ConfigurationError)
    assert "exists already" in str(outcome.exception)
    assert (target / "README.md").read_text() == "mine"


def test_passes_its_own_tests_without_changes(tmp_path: Path) -> None:
    target = write_plugin("tempered", tmp_path)
    for check in (["check"], ["format", "--check"]):
        subprocess.run([sys.executable, "-m", "ruff", *check, "."], cwd=target, check=True, timeout=60)
    python = environment_with(target, directory=tmp_path / "environment")
    tests = run_python(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(target), HF_HUB_OFFLINE="1")
    assert tests.returncode == 0, tests.stdout[-3000:]
    assert "passed" in tests.stdout
    listing = json.loads(run_python(python, "-m", "trl_refplug", "plugins", "--json").stdout)
    provider = next(entry for entry in listing["providers"] if entry["name"] == "tempered")
    assert provider["error"] == ""
    assert [option["name"] for option in provider["options"]] == ["sharpness"]


def test_help_is_fast() -> None:
    """Nothing slow may be imported. Importing it is not timed, because the time depends on the machine."""
    outcome = run_here("new-plugin", "--help")
    assert "NAME" in outcome.stdout
    code = "import sys\nfrom trl_refplug.cli.main import app\nprint({'torch', 'trl', 'rich.table'} & set(sys.modules))"
    assert run_python(sys.executable, "-c", code).stdout.strip() == "set()"
