"""
Everything trl-refplug raises on purpose.

```
RefPlugError
├── ConfigurationError (ValueError)      a flag, an option or a combination of them cannot work
│   ├── OptionsError                     `ref_provider_kwargs` do not fit the provider's options
│   ├── UnknownProviderError (LookupError)   no installed plugin registers that provider name
│   └── ImpureReferenceError             the policy's set-up would make the reference drift or be something else
├── PluginError                          the selected provider's plugin failed to load; its own error is the cause
├── SeamError                            TRL does not look as this release of trl-refplug expects
├── ReferenceMismatchError               the log-probs, or the reference itself, are not those that were declared
├── InvalidLogProbsError                 a provider answered with a wrong shape, dtype or a non-finite value
├── RemoteError                          a reference server cannot be reached, refuses, or cannot be trusted
│   └── serving.http_errors.UnreachableError   no server has answered in time
├── UnsupportedInputError (ValueError)   this provider cannot score this batch
├── StoreError                           a log-prob store cannot be opened, read or written
│   ├── MissingRowError                  a row is not in the store, and nothing may score it now
│   ├── StoreVersionError                it holds shards written by a newer release
│   └── StoreWriteError                  no space, no permission, no such place; what was published before is kept
└── compare.demo_model.DemoModelError    the demo's model can neither be found nor fetched

RefPlugWarning (UserWarning)             something is wrong that does not concern the reference in use
├── store.StoreWarning                   part of a store cannot be used: its rows are scored again
└── scoring.ExactFallbackWarning         rows that were to be packed are scored exactly
```

Every message says what was found, what was expected and which option to change.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib.util import find_spec


class RefPlugError(Exception):
    """Base of all exceptions of trl-refplug."""


class ConfigurationError(RefPlugError, ValueError):
    """A flag, an option or a combination of them cannot work. Raised before any long work starts."""


class OptionsError(ConfigurationError):
    """`ref_provider_kwargs` do not fit the options of the selected provider."""


class UnknownProviderError(ConfigurationError, LookupError):
    """No installed plugin registers the provider name that was asked for."""


class ImpureReferenceError(ConfigurationError):
    """The policy is set up so that the declared reference would drift during training or be another distribution."""


class PluginError(RefPlugError):
    """The plugin of the selected provider failed to load. `__cause__` is the plugin's own error."""


class SeamError(RefPlugError):
    """TRL's trainer does not reach its reference in the way this release of trl-refplug supports."""


class ReferenceMismatchError(RefPlugError):
    """The reference in use is not the one declared: other values, another identity after resume or on another rank."""


class InvalidLogProbsError(RefPlugError):
    """A provider answered with a wrong shape, a wrong dtype or a value that is not finite."""


class RemoteError(RefPlugError):
    """A reference server cannot be reached in time, refuses to answer, or answers what cannot be trusted."""


class UnsupportedInputError(RefPlugError, ValueError):
    """The provider cannot score this batch (multimodal inputs, rows that cannot be sliced, ...)."""


class RefPlugWarning(UserWarning):
    """Something is wrong that does not concern the reference in use: a broken plugin nobody selected, for example."""


class StoreError(RefPlugError):
    """A log-prob store cannot be opened, read or written as asked."""


class MissingRowError(StoreError):
    """A row that training asks for is not in the log-prob store, and nothing may score it now."""


class StoreVersionError(StoreError):
    """A shard of the store has a format version that this release does not know."""


class StoreWriteError(StoreError):
    """Rows could not be published. What was published before is kept; `__cause__` says what went wrong."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`" Did you mean 'frozen'?"` if one of `known` is spelled almost like `word`, else an empty string."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def require_extra(what: str, extra: str, *modules: str) -> None:
    """
    Check that the modules are there that an extra of this package installs.

    Raises:
        ConfigurationError: A module is missing. The message says that `what` needs it, and how to install it.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise ConfigurationError(f"{what} needs {', '.join(missing)}: pip install 'trl-refplug[{extra}]'")
