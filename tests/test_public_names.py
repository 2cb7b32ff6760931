"""All public names exist and are documented, and importing the package is fast."""

import inspect
import subprocess
import sys

import pytest

import trl_refplug
from trl_refplug import errors, provider


DOCUMENTED_WHERE_DEFINED = {"API_VERSION", "__version__"}  # plain values


@pytest.mark.parametrize("name", trl_refplug.__all__)
def test_public_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(trl_refplug, name)
    assert name in dir(trl_refplug)
    if name not in DOCUMENTED_WHERE_DEFINED:
        docstring = value.__doc__ or ""
        inherited = getattr(value.__base__, "__doc__", None) if inspect.isclass(value) else None
        assert docstring.strip(), f"{name} has no docstring"
        assert docstring != inherited, f"{name} only has its base's docstring"
        assert not docstring.startswith(f"{name}("), f"{name} only has the signature dataclass generates"


@pytest.mark.parametrize("module", [errors, provider])
def test_all_that_is_public_in_a_module_is_public(module: object) -> None:
    defined = {
        name
        for name, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }
    assert defined <= set(trl_refplug.__all__)


def test_public_names_are_listed_once_and_others_do_not_exist() -> None:
    assert sorted(set(trl_refplug.__all__)) == sorted(trl_refplug.__all__)
    with pytest.raises(AttributeError, match="RefPlugSFTTrainer"):
        trl_refplug.RefPlugSFTTrainer  # noqa: B018


def loaded_by(code: str) -> set[str]:
    """The heavy packages that are imported when `code` runs in a fresh interpreter."""
    heavy = "{'torch', 'transformers', 'trl', 'peft', 'accelerate', 'datasets', 'pydantic', 'numpy'}"
    code = f"{code}\nimport sys\nprint(','.join(sorted({heavy} & set(sys.modules))))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return set(filter(None, output.strip().split(",")))


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_by("import trl_refplug; trl_refplug.ReferenceProvider; dir(trl_refplug)") == set()


def test_listing_built_in_providers_loads_nothing_heavy() -> None:
    code = """
from trl_refplug.plugins import plugin_manager
for provider in plugin_manager().providers.values():
    provider.options, provider.capabilities
"""
    assert loaded_by(code) == set()


def test_the_check_for_heavy_packages_sees_them() -> None:
    assert "numpy" in loaded_by("import numpy")
