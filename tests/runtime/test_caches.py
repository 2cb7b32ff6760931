"""The cache directory follows the XDG specification."""

from pathlib import Path

import pytest

from trl_refplug.runtime.caches import cache_directory


@pytest.mark.parametrize(
    ("variable", "base"), [("/somewhere", "/somewhere"), ("", "/home/me/.cache"), ("relative", "/home/me/.cache")]
)
def test_the_users_cache(variable: str, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CACHE_HOME", variable)
    assert cache_directory("store") == Path(base) / "trl-refplug" / "store"
