"""`trl-refplug plugins`, with plugins that pip installed in a fresh environment."""

import json
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.cli.processes import ROOT, environment_with, run_python
from tests.conftest import FakeSite
from trl_refplug import Capabilities


PACKAGES = ROOT / "tests" / "packages"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment in which pip has installed the packages in `tests/packages`."""
    return environment_with(*sorted(PACKAGES.iterdir()), directory=tmp_path_factory.mktemp("environment"))


def listed(python: Path | str, **environment: str) -> dict[str, dict[str, Any]]:
    """Run `plugins --json`. Returns the plugins and the providers by name."""
    completed = run_python(python, "-m", "trl_refplug", "plugins", "--json", **environment)
    assert completed.returncode == 0, completed.stderr
    listing = json.loads(completed.stdout)
    return {kind: {entry["name"]: entry for entry in entries} for kind, entries in listing.items()}


def test_pip_installed_plugins_are_listed(python: Path) -> None:
    listing = listed(python, TRL_REFPLUG_BLOCK="refplug-twin")
    plugins, providers = listing["plugins"], listing["providers"]
    assert {name: plugin["status"] for name, plugin in plugins.items()} == {
        "builtin": "ok",
        "broken": "failed",
        "future": "incompatible",
        "twin": "blocked",
        "uniform": "ok",
    }
    assert plugins["uniform"]["distribution"] == "refplug-uniform"
    assert plugins["uniform"]["version"] == "1.2"
    assert Path(plugins["uniform"]["location"]).parts[-2:] == ("refplug_uniform", "__init__.py")
    assert plugins["uniform"]["providers"] == ["uniform"]
    assert plugins["broken"]["exception"] == "ModuleNotFoundError"
    assert "import a_package_nobody_has" in plugins["broken"]["traceback"]
    assert "999" in plugins["future"]["reason"]
    assert providers["uniform"] == {
        "name": "uniform",
        "plugin": "uniform",
        "distribution": "refplug-uniform",
        "target": "refplug_uniform.provider:UniformProvider",
        "capabilities": asdict(Capabilities(temperature=True, offline=True)),
        "options": [
            {
                "name": "scale",
                "type": "float",
                "required": False,
                "default": 1.0,
                "help": "Multiplies every log-probability.",
            }
        ],
        "error": "",
    }


def test_duplicates_are_listed_with_the_choice(python: Path) -> None:
    plugins = listed(python)["plugins"]
    for name in ("twin", "uniform"):
        assert plugins[name]["status"] == "failed"
        for part in ("refplug-twin 0.3", "refplug-uniform 1.2", "TRL_REFPLUG_BLOCK=refplug-twin"):
            assert part in plugins[name]["reason"]


def test_table_at_80_columns(python: Path) -> None:
    completed = run_python(python, "-m", "trl_refplug", "plugins", TRL_REFPLUG_LOAD="uniform,broken,future")
    assert completed.returncode == 0
    assert completed.stderr == ""  # broken plugins are listed, and there is no warning about them
    lines = completed.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in completed.stdout
    flat = re.sub(r"\s+", " ", completed.stdout)
    for part in (
        "builtin ok trl-refplug 0.1.0",
        "broken failed refplug-broken 0.1",
        "ModuleNotFoundError: No module named 'a_package_nobody_has'.",
        "future incompatible refplug-future 9.0",
        "twin blocked refplug-twin 0.3",
        "uniform ok refplug-uniform 1.2",
        "Not among TRL_REFPLUG_LOAD=uniform,broken,future.",
        "uniform uniform temperature scale: float = 1.0 offline",
    ):
        assert part in flat
    # The traceback is shown once. It has the place in the plugin's own code, and not the way in which it was reached.
    assert completed.stdout.count("Traceback") == 1
    assert completed.stdout.count("import a_package_nobody_has") == 1
    assert "importlib" not in completed.stdout


def test_provider_that_cannot_be_imported_is_listed_with_its_reason(site: FakeSite) -> None:
    source = """
        from trl_refplug import hookimpl
        print("hello from a plugin")

        @hookimpl
        def refplug_register_providers(register):
            register("lazy", "nowhere.provider:Provider")
    """
    site.install("acme-refs", plugins={"acme": "acme_mod"}, modules={"acme_mod": source})
    path = os.pathsep.join([str(site.path), str(ROOT)])
    provider = listed(sys.executable, PYTHONPATH=path)["providers"]["lazy"]  # what the plugin prints is left out
    assert provider["capabilities"] == {}
    assert "ModuleNotFoundError: No module named 'nowhere'" in provider["error"]

    table = run_python(sys.executable, "-m", "trl_refplug", "plugins", PYTHONPATH=path).stdout
    assert "hello from a plugin" not in table
    assert "ModuleNotFoundError" in table


def test_a_class_that_is_not_there_is_not_ok(site: FakeSite) -> None:
    """Its options and capabilities are registered with it, so that the listing does not import it."""
    source = """
        from dataclasses import dataclass
        from trl_refplug import Capabilities, hookimpl

        @dataclass(frozen=True)
        class Options:
            pass

        @hookimpl
        def refplug_register_providers(register):
            register("lazy", "acme_lazy:Provider", options=Options, capabilities=Capabilities())
    """
    site.install(
        "acme-refs", plugins={"acme": "acme_mod"}, modules={"acme_mod": source, "acme_lazy": "class Other: 1"}
    )
    listing = listed(sys.executable, PYTHONPATH=os.pathsep.join([str(site.path), str(ROOT)]))
    assert listing["plugins"]["acme"]["status"] == "failed"
    assert "acme_lazy has no 'Provider'" in listing["plugins"]["acme"]["reason"]


@pytest.mark.parametrize("variable", ["TRL_REFPLUG_BLOCK", "TRL_REFPLUG_LOAD"])
def test_a_misspelt_name_of_a_plugin_is_warned_about_once(variable: str) -> None:
    completed = run_python(sys.executable, "-m", "trl_refplug", "plugins", **{variable: "bultin"})
    assert completed.returncode == 0
    assert completed.stderr == (
        f"Warning: {variable} names 'bultin', but no such plugin or distribution is installed. Did you mean "
        "'builtin'?\n"
    )


TRAIN = """
import sys
from pathlib import Path
from tests import tiny
from tests.trainers import runs

args = {"ref_provider": "uniform", "ref_provider_kwargs": '{"scale": 2.0}', "max_steps": 1}
trainer = runs.build("dpo", Path(sys.argv[1]), tiny.model(), args=args)
trainer.train()
print(type(trainer.ref_model.provider).__name__, trainer.ref_model.provider.options.scale, trainer.state.global_step)
"""


def test_pip_installed_provider_trains_by_flag_alone(python: Path, tmp_path: Path) -> None:
    completed = run_python(python, "-c", TRAIN, str(tmp_path), TRL_REFPLUG_BLOCK="twin", HF_HUB_OFFLINE="1")
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.splitlines()[-1] == "UniformProvider 2.0 1"
    for broken in ("broken", "future"):  # these are not selected, so each causes one warning
        assert completed.stderr.count(f"RefPlugWarning: The plugin '{broken}'") == 1
    assert "'twin'" not in completed.stderr  # a blocked plugin causes no warning


def test_pip_installed_provider_trains_on_the_command_line(python: Path, tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    tiny.preference_data().to_json(data)
    arguments = ["--model_name_or_path", tiny.saved(tmp_path), "--dataset_name", str(data)]
    arguments += ["--output_dir", str(tmp_path / "out"), "--max_steps", "2", "--use_cpu", "--bf16", "False"]
    arguments += ["--per_device_train_batch_size", "2", "--report_to", "none", "--save_strategy", "steps"]
    reference = ["--ref_provider", "uniform", "--ref_provider_kwargs", '{"scale": 2.0}']
    done = run_python(python, "-m", "trl_refplug", "dpo", *arguments, *reference, TRL_REFPLUG_BLOCK="refplug-twin")
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "out" / "checkpoint-2" / "refplug" / "reference.json").read_text())
    assert record["provider"] == "uniform"

    # For the broken plugin, its own traceback is shown before anything is loaded.
    broken = run_python(python, "-m", "trl_refplug", "dpo", *arguments, "--ref_provider", "broken")
    assert broken.returncode == 2
    assert "import a_package_nobody_has" in broken.stderr
    assert "ModuleNotFoundError" in broken.stderr


def test_selected_broken_plugin_shows_its_own_traceback(python: Path) -> None:
    code = "from trl_refplug.plugins import plugin_manager; plugin_manager().provider_class('broken')"
    stderr = run_python(python, "-c", code).stderr
    own, _, ours = stderr.partition("The above exception was the direct cause of the following exception")
    assert "import a_package_nobody_has" in own
    assert "PluginError: No provider 'broken', as the plugin 'broken' of refplug-broken 0.1 failed to load." in ours
    assert "RefPlugWarning" not in stderr
