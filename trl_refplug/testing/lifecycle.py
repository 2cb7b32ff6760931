"""Tests that options are checked, that the declared capabilities are true, and that `close` does no harm."""

from __future__ import annotations

from typing import Any

from trl_refplug.errors import OptionsError
from trl_refplug.options import describe_options, parse_options
from trl_refplug.provider import ReferenceProvider
from trl_refplug.testing.bench import Attached, Bench, require
from trl_refplug.testing.fixtures import Setting


class LifeTests(Setting):
    def test_capabilities(self, attached: Attached) -> None:
        can, provider_class = attached.provider.capabilities, type(attached.provider)
        require(
            not (can.moving and can.offline),
            "Capabilities(moving=True, offline=True): values of a reference that moves cannot be stored beforehand.",
        )
        require(
            not can.overlap or provider_class.submit is not ReferenceProvider.submit,
            "capabilities.overlap is declared, and there is no submit().",
        )
        require(
            can.local_model or attached.provider.module is None,
            "`module` is a model in the trainer's process, and capabilities.local_model is not declared.",
        )

    def test_options_are_frozen(self, bench: Bench) -> None:
        options_class: Any = bench.provider_class.Options
        require(
            bool(options_class.__dataclass_params__.frozen),
            f"{options_class.__name__} can be changed after it was checked: write @dataclass(frozen=True).",
        )

    def test_options_are_checked(self, bench: Bench) -> None:
        options_class = bench.provider_class.Options
        valid = dict(bench.options)
        for option in describe_options(options_class):
            require(
                _refused(options_class, {**valid, option.name: object()}, option.name),
                f"Option {option.name!r} takes anything ({option.type}), so a mistake in it is found late or never. "
                "Annotate it with what it takes (float, str | None, Literal[...]).",
            )
        require(
            _refused(options_class, {**valid, "surely_no_option": 1}, "surely_no_option"),
            "An unknown option is not refused by name.",
        )

    def test_options_have_help(self, bench: Bench) -> None:
        silent = [option.name for option in describe_options(bench.provider_class.Options) if not option.help]
        require(
            not silent,
            f"Options without help: {', '.join(silent)}. `trl-refplug plugins --json` shows it: "
            'field(default=..., metadata={"help": "..."}).',
        )

    def test_close_twice(self, attached: Attached) -> None:
        attached.ask(attached.batch)
        attached.provider.close()
        _require_closes(attached.provider, "close() failed the second time; it may be called more than once")

    def test_close_before_setup(self, bench: Bench) -> None:
        _require_closes(bench.provider(), "close() failed before setup(), where flags are only checked")


def _refused(options_class: type, values: dict[str, Any], name: str) -> bool:
    try:
        parse_options("tested", options_class, values)
    except OptionsError as error:
        return repr(name) in str(error)
    return False


def _require_closes(provider: ReferenceProvider, message: str) -> None:
    __tracebackhide__ = True
    try:
        provider.close()
    except Exception as error:
        require(False, f"{message}: {type(error).__name__}: {error}")
