"""Turning `ref_provider_kwargs` into the options of a provider: a frozen dataclass, validated by pydantic."""

from __future__ import annotations

import dataclasses
import inspect
import json
import reprlib
from collections.abc import Mapping
from typing import Any, TypeVar

from trl_refplug.errors import OptionsError, PluginError, did_you_mean


OptionsT = TypeVar("OptionsT")


@dataclasses.dataclass(frozen=True)
class OptionDescription:
    """
    One option of a provider, as it is shown to people.

    Args:
        name (`str`): The key in `ref_provider_kwargs`.
        type (`str`): Its type, as it is written in the options class.
        required (`bool`): Whether it has no default.
        default (`Any`): The default; `None` if it is required.
        help (`str`): The `help` of the field's metadata.
    """

    name: str
    type: str
    required: bool
    default: Any
    help: str

    def __str__(self) -> str:
        return f"{self.name}: {self.type}" + (" (required)" if self.required else f" = {self.default!r}")


def describe_options(options_class: type) -> list[OptionDescription]:
    """The options that a provider takes, in the order in which its options class declares them."""
    described = []
    for field in dataclasses.fields(options_class):
        if not field.init:
            continue
        required, default = False, field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        elif default is dataclasses.MISSING:
            required, default = True, None
        type_name = _type_name(field.type)
        described.append(OptionDescription(field.name, type_name, required, default, field.metadata.get("help", "")))
    return described


def _type_name(annotation: Any) -> str:
    if isinstance(annotation, str):
        return annotation
    return annotation.__name__ if type(annotation) is type else inspect.formatannotation(annotation)


def parse_options(
    provider_name: str, options_class: type[OptionsT], values: Mapping[str, Any] | str | None = None
) -> OptionsT:
    """
    Make the options of a provider from what the user wrote.

    Args:
        provider_name (`str`): For messages.
        options_class (`type`): A dataclass; its annotations say what is valid.
        values (`Mapping[str, Any]`, `str` or `None`): The values, or a JSON object as text.

    Raises:
        [`OptionsError`]: Options are unknown, missing or of the wrong type. The message names all problems at once.
        [`PluginError`]: The options class itself cannot be understood.
    """
    given = _as_mapping(provider_name, values)
    described = {option.name: option for option in describe_options(options_class)}
    problems = [f"Unknown option {key!r}.{did_you_mean(str(key), described)}" for key in given if key not in described]
    options, invalid = _validate(provider_name, options_class, {key: given[key] for key in given if key in described})
    for name, messages in invalid.items():
        if name not in given:
            problems.append(f"Option {name!r} is required." if name else " ".join(messages))
        else:
            found = f"found {reprlib.repr(given[name])} ({type(given[name]).__name__})"
            problems.append(f"Option {name!r}: {found}; expected {described[name].type}: {'; '.join(messages)}.")
    if problems:
        takes = "".join(f"\n  {option}" for option in described.values()) or " no options."
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise OptionsError(f"ref_provider_kwargs do not fit provider {provider_name!r}:{listed}\nIt takes{takes}")
    assert options is not None  # it is None only if there are problems
    return options


def _as_mapping(provider_name: str, values: Mapping[str, Any] | str | None) -> Mapping[str, Any]:
    found: Any = {} if values is None else values
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except json.JSONDecodeError as error:
            raise OptionsError(
                f"ref_provider_kwargs of provider {provider_name!r}: found {reprlib.repr(values)}, which is not JSON "
                f'({error}); expected an object such as \'{{"name": "value"}}\'.'
            ) from None
    if not isinstance(found, Mapping):
        raise OptionsError(
            f"ref_provider_kwargs of provider {provider_name!r}: found {reprlib.repr(found)} "
            f"({type(found).__name__}); expected a dict, or a JSON object as text."
        )
    return found


def _validate(
    provider_name: str, options_class: type[OptionsT], values: Mapping[str, Any]
) -> tuple[OptionsT | None, dict[str, list[str]]]:
    """
    Validate the options.

    Returns:
        `tuple`: The options, and no problems; or `None`, and the problems by the option they are about. Problems that
        are about several options together are found under an empty name.
    """
    import pydantic  # imported only if there is something to validate, so that listing providers stays fast

    try:
        return pydantic.TypeAdapter(options_class).validate_python(values), {}
    except pydantic.ValidationError as error:
        invalid: dict[str, list[str]] = {}
        for detail in error.errors(include_url=False):
            name, *inside = (str(part) for part in detail["loc"] or ("",))
            message = detail["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
            invalid.setdefault(name, []).append(f"{'.'.join(inside)}: {message}" if inside else message)
        return None, invalid
    except (pydantic.PydanticUserError, pydantic.PydanticUndefinedAnnotation) as error:
        raise PluginError(
            f"The options of provider {provider_name!r} cannot be validated, as their class "
            f"{options_class.__module__}.{options_class.__qualname__} is not understood: {error}"
        ) from error
