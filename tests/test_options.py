"""`ref_provider_kwargs` become the options of a provider, or an error that says all that is wrong with them."""

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_refplug import NoOptions, OptionsError, PluginError
from trl_refplug.options import describe_options, parse_options


@dataclass(frozen=True)
class Options:
    path: Path
    alpha: float = field(default=0.6, metadata={"help": "Weight of the policy."})
    sync_steps: int = 512
    start: Literal["adapter", "base"] = "adapter"
    tags: tuple[str, ...] = ()
    device: "str | None" = None
    extra: dict[str, int] = field(default_factory=lambda: {"a": 1})
    derived: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.sync_steps < 1:
            raise ValueError("sync_steps must be at least 1")


def problems_of(values: object) -> str:
    with pytest.raises(OptionsError) as caught:
        parse_options("ema", Options, values)
    assert "'ema'" in str(caught.value)
    return str(caught.value)


def test_values_and_json_text_are_the_same() -> None:
    values = {"path": "store", "alpha": 1, "tags": ["x", "y"], "start": "base"}
    expected = Options(path=Path("store"), alpha=1.0, tags=("x", "y"), start="base")
    parsed = parse_options("ema", Options, values)
    assert parsed == parse_options("ema", Options, json.dumps(values)) == expected
    assert type(parsed) is Options
    assert isinstance(parsed.alpha, float)


def test_yaml_reads_1e_4_as_text() -> None:
    assert parse_options("ema", Options, {"path": "x", "alpha": "1e-4"}).alpha == 1e-4


@pytest.mark.parametrize("values", [None, {}, "{}"])
def test_no_values(values: object) -> None:
    assert parse_options("frozen", NoOptions, values) == NoOptions()


def test_unknown_option_lists_what_there_is() -> None:
    message = problems_of({"path": "x", "alfa": 0.1})
    assert "Unknown option 'alfa'. Did you mean 'alpha'?" in message
    for line in ("path: Path (required)", "alpha: float = 0.6", "start: Literal['adapter', 'base'] = 'adapter'"):
        assert f"\n  {line}" in message
    assert "derived" not in message


def test_provider_without_options() -> None:
    with pytest.raises(OptionsError, match=r"Unknown option 'x'\.\nIt takes no options\."):
        parse_options("uniform", NoOptions, {"x": 1})


def test_all_problems_at_once() -> None:
    message = problems_of({"alpha": "high", "start": "bse", "tags": ["x", 1], "zeta": 0, "device": 3})
    for problem in (
        "Unknown option 'zeta'.",
        "Option 'path' is required.",
        "Option 'alpha': found 'high' (str); expected float: a valid number",
        "Option 'start': found 'bse' (str); expected Literal['adapter', 'base']: 'adapter' or 'base'.",
        "Option 'tags': found ['x', 1] (list); expected tuple[str, ...]: 1: a valid string.",
        "Option 'device': found 3 (int); expected str | None: a valid string.",
    ):
        assert f"\n  - {problem}" in message
    assert message.count("\n  - ") == 6


def test_check_of_the_options_themselves() -> None:
    assert "\n  - sync_steps must be at least 1" in problems_of({"path": "x", "sync_steps": 0})


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ("{'path': 1}", "which is not JSON"),
        ("[1]", "found [1] (list)"),
        ([("path", "x")], "found [('path', 'x')] (list)"),
        ({1: 2, "path": "x"}, "Unknown option 1."),
    ],
)
def test_values_that_are_no_mapping(values: object, told: str) -> None:
    assert told in problems_of(values)


def test_options_nobody_can_validate_are_the_plugins_fault() -> None:
    @dataclass(frozen=True)
    class Unreadable:
        value: "NotDefinedAnywhere" = None  # noqa: F821

    with pytest.raises(PluginError, match=r"provider 'acme' .*Unreadable"):
        parse_options("acme", Unreadable, {"value": 1})


def test_description() -> None:
    described = {option.name: option for option in describe_options(Options)}
    assert list(described) == ["path", "alpha", "sync_steps", "start", "tags", "device", "extra"]
    assert (described["path"].required, described["path"].default) == (True, None)
    assert (described["alpha"].type, described["alpha"].default, described["alpha"].required) == ("float", 0.6, False)
    assert described["alpha"].help == "Weight of the policy."
    assert described["device"].type == "str | None"
    assert described["extra"].default == {"a": 1}


@given(
    alpha=st.floats(allow_nan=False, allow_infinity=False),
    sync_steps=st.integers(1, 2**40),
    tags=st.lists(st.text(), max_size=3),
    device=st.none() | st.text(),
    path=st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1),
)
def test_every_valid_value_survives(alpha: float, sync_steps: int, tags: list[str], device: str, path: str) -> None:
    values = {"alpha": alpha, "sync_steps": sync_steps, "tags": tags, "device": device, "path": path}
    expected = Options(Path(path), alpha, sync_steps, tags=tuple(tags), device=device)
    assert parse_options("ema", Options, values) == expected
    assert parse_options("ema", Options, json.dumps(values)) == expected


@given(st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.integers())))
def test_any_other_value_is_an_options_error(values: dict[str, object]) -> None:
    with contextlib.suppress(OptionsError):
        assert isinstance(parse_options("ema", Options, values), Options)
