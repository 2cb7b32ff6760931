"""Quiet, offline and repeatable, for every test."""

import os
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models are faster so, and sums do not depend on the machine

import pytest
from hypothesis import HealthCheck, settings


# The same examples in every run, however slow the machine is.
settings.register_profile(
    "steady", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("steady")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # Started by a shell in the background: the processes that tests interrupt would inherit that it is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    import datasets
    import transformers

    from trl_refplug.testing.ranks import start_method

    start_method()  # whichever test is the first to fork
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def _own_cache(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is remembered of models, and default stores, are each test's own; a real model is not fetched anew."""
    if request.node.get_closest_marker("realmodel"):
        return
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


class FakeSite:
    """A directory on `sys.path` that distributions are 'installed' into, without pip: metadata and modules only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.modules: set[str] = set()

    def install(
        self,
        distribution: str,
        version: str = "1.0",
        *,
        plugins: dict[str, str],
        modules: dict[str, str] | None = None,
    ) -> Path:
        """
        Install `modules` (name to source) as `distribution`, with the entry points `plugins` (name to value). Returns
        its metadata directory.
        """
        metadata = self.path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        entry_points = "".join(f"{name} = {value}\n" for name, value in plugins.items())
        (metadata / "entry_points.txt").write_text(f"[trl_refplug]\n{entry_points}")
        for name, source in (modules or {}).items():
            (self.path / f"{name}.py").write_text(textwrap.dedent(source))
            self.modules.add(name)
        return metadata


@pytest.fixture
def make_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], FakeSite]]:
    """Directories for [`FakeSite`] by name; each new one comes first on `sys.path`."""
    sites: list[FakeSite] = []

    def make(name: str) -> FakeSite:
        site = FakeSite(tmp_path / name)
        site.path.mkdir()
        monkeypatch.syspath_prepend(site.path)
        sites.append(site)
        return site

    monkeypatch.delenv("TRL_REFPLUG_BLOCK", raising=False)
    monkeypatch.delenv("TRL_REFPLUG_LOAD", raising=False)
    yield make
    for name in {name for site in sites for name in site.modules}:
        sys.modules.pop(name, None)


@pytest.fixture
def site(make_site: Callable[[str], FakeSite]) -> FakeSite:
    return make_site("site")
