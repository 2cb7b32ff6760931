"""
Finding out what is wrong with a plugin or a provider.

Every function here answers with sentences that can be shown to people, and with nothing (an empty string or list) if
all is well.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import re
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

import pluggy

from trl_refplug.errors import did_you_mean
from trl_refplug.hookspecs import API_VERSION
from trl_refplug.provider import Capabilities, ReferenceProvider


def incompatibility(plugin: object) -> str:
    """Why the plugin does not fit the plugin interface of this release; an empty string if it does."""
    spoken = getattr(plugin, "API_VERSION", 1)
    if type(spoken) is int and spoken == API_VERSION:
        return ""
    if type(spoken) is not int:
        remedy = "API_VERSION must be an integer"
    elif spoken > API_VERSION:
        remedy = "upgrade trl-refplug, or install an older release of the plugin"
    else:
        remedy = "install a newer release of the plugin, or an older trl-refplug"
    return f"It speaks plugin interface {spoken!r}, this trl-refplug speaks {API_VERSION}: {remedy}."


def hook_problems(plugin: object, hooks: pluggy.PluginManager) -> Iterator[str]:
    """
    Find hook implementations that are misspelled, unmarked or wrongly declared, and plugins that implement no hook.
    pluggy accepts most of these mistakes silently.
    """
    if inspect.isclass(plugin):
        yield f"The entry point names the class {plugin.__qualname__}; expected a module or an instance."
        return
    specs = {name: hook.spec for name, hook in vars(hooks.hook).items() if hook.spec}
    looked_like_hooks = 0
    for attribute in dir(plugin):
        options = hooks.parse_hookimpl_opts(plugin, attribute)
        if options is None and not (
            attribute.startswith("refplug_") and inspect.isroutine(getattr(plugin, attribute, None))
        ):
            continue
        looked_like_hooks += 1
        if options is None:
            yield f"{attribute}() has no @hookimpl marker, and the prefix refplug_ is for hooks."
        hook = (options and options.get("specname")) or attribute
        if hook not in specs:
            yield f"There is no hook {hook!r}.{did_you_mean(hook, specs)}"
        elif options is not None:
            yield from _implementation_problems(attribute, getattr(plugin, attribute), options, specs[hook].argnames)
    if not looked_like_hooks:
        yield f"It implements no hook; there are {', '.join(specs)}."


def _implementation_problems(
    name: str, function: Callable[..., object], options: Any, arguments: tuple[str, ...]
) -> Iterator[str]:
    if options.get("wrapper") or options.get("hookwrapper"):
        yield f"{name}() is a hook wrapper; expected a plain implementation."
    elif inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        yield f"{name}() is asynchronous or a generator and would never run; expected a plain function."
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name not in arguments and parameter.default is parameter.empty:
            yield (
                f"{name}() takes {str(parameter)!r}; expected arguments from ({', '.join(arguments)})."
                f"{did_you_mean(parameter.name, arguments)}"
            )


def registration_problem(
    name: object,
    target: object,
    options: object = None,
    capabilities: object = None,
    *,
    builtin: Container[str],
    own: Container[str],
) -> str:
    """
    Why a registration is refused; an empty string if it is accepted.

    Args:
        name, target, options, capabilities: What the plugin passed to `register`.
        builtin (`Container[str]`): The names of the built-in providers.
        own (`Container[str]`): The names that the same plugin has registered so far.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_-]*", name):
        return (
            f"Found provider name {name!r}; expected a lower-case letter, then lower-case letters, digits, '-' or '_'."
        )
    if name == "auto":
        return "The provider name 'auto' is reserved; refplug_select_provider is the hook that answers it."
    if name in builtin:
        return f"The provider name {name!r} is taken by trl-refplug itself, and the built-in provider stays."
    if name in own:
        return f"The provider name {name!r} is registered twice by this plugin."
    if not isinstance(target, str):
        return " ".join(f"Provider {name!r}: {problem}" for problem in class_problems(target, options, capabilities))
    if not re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", target):
        return f"Provider {name!r}: found target {target!r}; expected a class or 'package.module:Class'."
    problems = []
    if options is not None and not (inspect.isclass(options) and dataclasses.is_dataclass(options)):
        problems.append(f"found options={options!r}; expected a dataclass.")
    if capabilities is not None and not isinstance(capabilities, Capabilities):
        problems.append(f"found capabilities={capabilities!r}; expected Capabilities.")
    return " ".join(f"Provider {name!r}: {problem}" for problem in problems)


def class_problems(provider: object, options: object = None, capabilities: object = None) -> list[str]:
    """
    Why `provider` cannot be used: it is not a complete provider class, or its options and capabilities are not those
    it was registered with. An empty list if it can.
    """
    if not (inspect.isclass(provider) and issubclass(provider, ReferenceProvider)):
        return [f"found {provider!r}; expected a subclass of trl_refplug.ReferenceProvider."]
    problems = []
    if missing := sorted(provider.__abstractmethods__):
        problems.append(f"{provider.__qualname__} does not define {', '.join(f'{name}()' for name in missing)}.")
    if not (inspect.isclass(provider.Options) and dataclasses.is_dataclass(provider.Options)):
        problems.append(f"found {provider.__qualname__}.Options = {provider.Options!r}; expected a dataclass.")
    if not isinstance(provider.capabilities, Capabilities):
        problems.append(
            f"found {provider.__qualname__}.capabilities = {provider.capabilities!r}; expected Capabilities."
        )
    if options not in (None, provider.Options):
        problems.append(
            f"{provider.__qualname__}.Options is {provider.Options!r}; it was registered with {options!r}."
        )
    if capabilities not in (None, provider.capabilities):
        problems.append(
            f"{provider.__qualname__}.capabilities are {provider.capabilities!r}; it was registered with "
            f"{capabilities!r}."
        )
    return problems


def target_problem(target: str) -> str:
    """
    Why a lazy target cannot be imported, as far as its source says so; an empty string if nothing speaks against it.

    Nothing is imported but the packages around the target's module, so that listing stays fast. A module that raises
    when it is imported is not found out.
    """
    module, _, name = target.partition(":")
    try:
        spec = importlib.util.find_spec(module)
    except Exception as error:  # the code of a package around it
        return f"{type(error).__name__}: {error}"
    if spec is None:
        return f"there is no module {module!r}"
    if spec.origin is None or not spec.origin.endswith(".py"):
        return ""
    try:
        body = ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    except SyntaxError as error:
        return f"SyntaxError in {spec.origin}, line {error.lineno}: {error.msg}"
    for package in _imported_packages(body):
        if importlib.util.find_spec(package) is None:
            return f"{module} imports {package!r}, which is not installed"
    names = _defined_names(body)
    wanted = name.partition(".")[0]
    if names is not None and wanted not in names:
        return f"{module} has no {wanted!r}.{did_you_mean(wanted, names)}".rstrip(".")
    return ""


def _imported_packages(body: list[ast.stmt]) -> set[str]:
    """The top-level packages that a module imports in any case: not in a function, and not under a condition."""
    packages = set()
    for statement in body:
        if isinstance(statement, ast.Import):
            packages |= {alias.name.partition(".")[0] for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom) and statement.module and not statement.level:
            packages.add(statement.module.partition(".")[0])
    return packages


def _defined_names(body: list[ast.stmt]) -> set[str] | None:
    """The names that a module's plain statements define; `None` if there may be others."""
    names: set[str] = set()
    for statement in body:
        if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(statement.name)
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in statement.names}
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            names |= {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}
        elif not isinstance(statement, ast.Expr):
            return None  # a condition or a loop may define anything
    return None if {"*", "__getattr__"} & names else names
