"""The files for those who join the project are consistent with the package."""

import re
import tomllib

import yaml

import trl_refplug
from tests.docs.pages import ROOT
from trl_refplug import API_VERSION


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_paths_in_the_guide_exist() -> None:
    for page in ("CONTRIBUTING.md", "RELEASING.md", "SECURITY.md"):
        paths = re.findall(r"`((?:trl_refplug|tests|docs|\.ci|\.github)/[\w/.-]*)`", read(page))
        missing = [path for path in paths if not (ROOT / path).exists()]
        assert missing == [], page


def test_versions_agree() -> None:
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["version"] == trl_refplug.__version__
    assert f"`API_VERSION` is one integer, at present {API_VERSION}." in read("RELEASING.md")


def test_workflows_and_templates_are_yaml() -> None:
    files = [*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml"]
    assert len(files) > 5
    for file in files:
        assert isinstance(yaml.safe_load(file.read_text(encoding="utf-8")), dict), file


def test_ci_runs_what_contributors_run() -> None:
    steps = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]["check"]["steps"]
    assert {"run": ".ci/run"} in steps


def test_ci_tries_every_supported_python() -> None:
    oldest = tomllib.loads(read("pyproject.toml"))["project"]["requires-python"].removeprefix(">=")
    matrix = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]["check"]["strategy"]["matrix"]
    assert matrix["python"][0] == oldest


def test_source_distribution_has_them() -> None:
    included = tomllib.loads(read("pyproject.toml"))["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    pages = {page.name for page in ROOT.glob("*.md")}
    assert pages | {"CITATION.cff", ".github", ".pre-commit-config.yaml"} <= set(included)
