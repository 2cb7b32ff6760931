"""
The hooks a plugin may implement. A plugin is a module or an instance that an entry point of the group `trl_refplug`
names:

```toml
[project.entry-points.trl_refplug]
uniform = "uniform_reference.plugin"
```

```python
from trl_refplug import hookimpl

API_VERSION = 1  # the interface this plugin was written for


@hookimpl
def refplug_register_providers(register):
    register("uniform", "uniform_reference.provider:UniformProvider")
```

A hook implementation names the arguments it wants, and may leave out the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import pluggy


if TYPE_CHECKING:
    from torch import Tensor

    from trl_refplug.provider import Capabilities, ReferenceBatch, ReferenceIdentity, ReferenceProvider


API_VERSION = 1
"""The plugin interface of this release. A plugin that declares another one is left out; none declared means 1."""

PROJECT = "trl_refplug"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a function of a plugin as the implementation of the hook of that name."""


class Register(Protocol):
    def __call__(
        self,
        name: str,
        target: type[ReferenceProvider] | str,
        *,
        options: type | None = None,
        capabilities: Capabilities | None = None,
    ) -> None:
        """
        Offer a provider as `ref_provider=name`.

        Args:
            name (`str`): Lower-case letters, digits, `-` and `_`.
            target (`type` or `str`): The class, or a lazy `"package.module:Class"`, imported when it is selected.
            options (`type`, *optional*), capabilities (`Capabilities`, *optional*): The `Options` and `capabilities`
                of the class. With both of them the provider is listed, and its flags are checked, without importing
                it: define them in a module that imports no torch.
        """


class SelectionContext(Protocol):
    """What `refplug_select_provider` may look at."""

    @property
    def args(self) -> Any:
        """The trainer's arguments."""

    @property
    def policy_is_peft(self) -> bool:
        """Whether the policy is, or will be, a PEFT model."""

    @property
    def has_ref_model(self) -> bool:
        """Whether a reference model was passed to the trainer."""

    @property
    def online(self) -> bool:
        """Whether the trainer generates its completions (GRPO, RLOO)."""

    @property
    def wants_stored(self) -> bool:
        """Whether TRL's `precompute_ref_log_probs` asks for a reference that is `stored`."""

    @property
    def wants_moving(self) -> bool:
        """Whether TRL's `sync_ref_model` asks for a reference that is `moving`."""


@hookspec
def refplug_register_providers(register: Register) -> None:
    """Call `register(name, target)` for every provider on offer. Lazy targets keep listing and starting up fast."""


@hookspec(firstresult=True)
def refplug_select_provider(context: SelectionContext) -> str | None:
    """
    Answer `ref_provider="auto"`: the name of a provider, or `None` to leave the choice to others. Plugins are asked
    only where neither TRL's own flags nor `ref_model=` decide.
    """


@hookspec
def refplug_scored(identity: ReferenceIdentity, batch: ReferenceBatch, log_probs: Tensor, seconds: float) -> None:
    """
    Observe an answer of the reference, for example to monitor it. What the hook returns is ignored.

    `log_probs` (float32 `[batch, seq - 1]`) is a copy; `batch` is the trainer's own and must not be changed; `seconds`
    is how long the trainer waited. An exception is reported once and does not reach training.
    """
