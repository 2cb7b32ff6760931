"""
trl-refplug: the log-probabilities of a TRL trainer's reference come from a plugin, which one flag selects.

```python
from trl_refplug import RefPlugDPOConfig, RefPlugDPOTrainer  # was: from trl import DPOConfig, DPOTrainer
```

Importing this package does not import torch. What needs torch is imported when it is used for the first time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from trl_refplug.errors import (
    ConfigurationError,
    ImpureReferenceError,
    InvalidLogProbsError,
    MissingRowError,
    OptionsError,
    PluginError,
    ReferenceMismatchError,
    RefPlugError,
    RefPlugWarning,
    RemoteError,
    SeamError,
    StoreError,
    StoreVersionError,
    StoreWriteError,
    UnknownProviderError,
    UnsupportedInputError,
)
from trl_refplug.hookspecs import API_VERSION, hookimpl
from trl_refplug.provider import (
    BulkScorer,
    Capabilities,
    ModelTraits,
    NoOptions,
    ReferenceBatch,
    ReferenceContext,
    ReferenceIdentity,
    ReferenceProvider,
    SampleCheck,
    ScoresInBulk,
    VerifiesStoredRows,
)


if TYPE_CHECKING:
    from trl_refplug.arguments import ReferenceArguments
    from trl_refplug.configs import RefPlugDPOConfig, RefPlugGRPOConfig, RefPlugKTOConfig, RefPlugRLOOConfig
    from trl_refplug.models.identity import digest_model
    from trl_refplug.trainers import RefPlugDPOTrainer, RefPlugGRPOTrainer, RefPlugKTOTrainer, RefPlugRLOOTrainer, plug


__version__ = "0.1.0"

_IMPORTED_LATE = {
    "trl_refplug.models.identity": ("digest_model",),
    "trl_refplug.arguments": ("ReferenceArguments",),
    "trl_refplug.configs": (
        "RefPlugDPOConfig",
        "RefPlugGRPOConfig",
        "RefPlugKTOConfig",
        "RefPlugRLOOConfig",
    ),
    "trl_refplug.trainers": (
        "RefPlugDPOTrainer",
        "RefPlugGRPOTrainer",
        "RefPlugKTOTrainer",
        "RefPlugRLOOTrainer",
        "plug",
    ),
}

__all__ = [
    "API_VERSION",
    "BulkScorer",
    "Capabilities",
    "ConfigurationError",
    "ImpureReferenceError",
    "InvalidLogProbsError",
    "MissingRowError",
    "ModelTraits",
    "NoOptions",
    "OptionsError",
    "PluginError",
    "RefPlugDPOConfig",
    "RefPlugDPOTrainer",
    "RefPlugError",
    "RefPlugGRPOConfig",
    "RefPlugGRPOTrainer",
    "RefPlugKTOConfig",
    "RefPlugKTOTrainer",
    "RefPlugRLOOConfig",
    "RefPlugRLOOTrainer",
    "RefPlugWarning",
    "ReferenceArguments",
    "ReferenceBatch",
    "ReferenceContext",
    "ReferenceIdentity",
    "ReferenceMismatchError",
    "ReferenceProvider",
    "RemoteError",
    "SampleCheck",
    "ScoresInBulk",
    "SeamError",
    "StoreError",
    "StoreVersionError",
    "StoreWriteError",
    "UnknownProviderError",
    "UnsupportedInputError",
    "VerifiesStoredRows",
    "__version__",
    "digest_model",
    "hookimpl",
    "plug",
]


def __getattr__(name: str) -> Any:
    for module, names in _IMPORTED_LATE.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
