"""
The patch of TRL: the one place where we change what TRL does with its reference.

All four trainers load their own reference inside `__init__`, by calling `create_model_from_path`, a name that is
imported into each trainer's module. Later they call `self.ref_model(..., labels=..., fused_lm_head=True).log_probs`.
While `__init__` runs, we replace that name by a function of ours, so that TRL never loads a second copy and gets our
module instead. TRL then does to our module all else that it does to a reference: dropout, LM head, temperature,
DeepSpeed, FSDP, device.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import trl
from trl.trainer.utils import get_config_model_id

from trl_refplug.errors import ConfigurationError, SeamError
from trl_refplug.trainers.reach import why_not


SUPPORTED = ">=1.15"
_LOADER = "create_model_from_path"
_MASKED_FLAGS = ("precompute_ref_log_probs", "sync_ref_model")


@dataclass(frozen=True)
class PatchPoint:
    """
    Where one of TRL's trainer classes loads its reference: the point at which we patch it.

    Args:
        owner (`type`): The class of TRL whose `__init__` loads the reference.
        signature (`inspect.Signature`): The signature of that `__init__`.
        online (`bool`): Whether the trainer generates its completions (GRPO, RLOO). Such a trainer has no argument
            `ref_model`, but a temperature, and it uses no reference at all when `beta` is 0.
    """

    owner: type
    signature: inspect.Signature
    online: bool

    @classmethod
    def find_in(cls, trainer_class: type) -> PatchPoint:
        """
        Find where a trainer of TRL, or a subclass of one, loads its reference.

        Raises:
            SeamError: The class has no reference, or TRL reaches it in a way this release does not know.
        """
        for candidate in trainer_class.__mro__:
            init: Any = candidate.__dict__.get("__init__")
            if init is None:
                continue
            names = inspect.unwrap(init).__code__.co_names if inspect.isfunction(init) else ()
            module = sys.modules[candidate.__module__]
            if _LOADER in names and "ref_model" in names and hasattr(module, _LOADER):
                signature = inspect.signature(init)
                return cls(candidate, signature, online="ref_model" not in signature.parameters)
        if reason := why_not(trainer_class):
            raise SeamError(
                f"{trainer_class.__name__} cannot take its reference from a provider: {reason}. Use it as it is, "
                "without `plug`. The page 'Which trainers' lists what works."
            )
        raise unsupported_trl(
            f"{trainer_class.__name__} does not load a reference in the way of TRL's DPO, KTO, GRPO or RLOO"
        )

    def needs_reference(self, args: Any) -> bool:
        """Whether TRL uses a reference at all. GRPO and RLOO use none when `beta` is 0."""
        return not (self.online and args.beta == 0.0)

    def default_args(self, model: Any) -> Any:
        """The arguments that TRL uses if it gets `args=None`."""
        owner: Any = self.owner
        config_class = getattr(sys.modules[owner.__module__], owner.__name__.replace("Trainer", "Config"))
        model_id = model if isinstance(model, str) else get_config_model_id(model.config)
        return config_class(f"{model_id.split('/')[-1]}-{owner._name}")


def unsupported_trl(found: str) -> SeamError:
    """The error for a release of TRL that does not work as we expect."""
    return SeamError(
        f"{found}. trl {trl.__version__} is installed; trl-refplug supports trl{SUPPORTED} where the reference is "
        "called with `fused_lm_head=True`. Install a supported release, or use TRL's own trainer."
    )


def check_flags(patch_point: PatchPoint, args: Any) -> None:
    """
    Refuse combinations of flags that TRL itself refuses. TRL does not see them, because [`flags_masked`] hides the
    flags from it.
    """
    if getattr(args, "sync_ref_model", False):
        if getattr(args, "precompute_ref_log_probs", False):
            raise ConfigurationError(
                "`sync_ref_model=True` moves the reference, so its log-probs cannot be precomputed: "
                "set one of `sync_ref_model` and `precompute_ref_log_probs` to False."
            )
        if not patch_point.needs_reference(args):
            raise ConfigurationError(
                "`sync_ref_model=True` has nothing to synchronize: with `beta=0.0` no reference is used. "
                "Set `beta` to a non-zero value, or `sync_ref_model=False`."
            )


@contextmanager
def flags_masked(args: Any) -> Iterator[None]:
    """
    Switch off TRL's own flags for the reference while TRL constructs its trainer: with `precompute_ref_log_probs` it
    would precompute inside `__init__`, without our reference, and `sync_ref_model` is an error with PEFT.
    """
    kept = {name: getattr(args, name) for name in _MASKED_FLAGS if getattr(args, name, False)}
    for name in kept:
        setattr(args, name, False)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(args, name, value)


@contextmanager
def loading_replaced(
    patch_point: PatchPoint,
    trainer: Any,
    *,
    policy_loaded: Callable[[Any], None],
    reference: Callable[[], Any],
    expected: Callable[[], int],
) -> Iterator[None]:
    """
    Replace the function with which TRL loads its reference, as long as the context lasts: during `__init__`.

    Args:
        patch_point ([`PatchPoint`]): Where the trainer's class loads its reference.
        trainer: The trainer under construction.
        policy_loaded: Called with the policy when TRL has loaded it from a path, before TRL changes anything in it.
        reference: Called when TRL wants to load its reference. TRL gets what it returns, which may be `None`.
        expected: Called at the end. It says how many loads must have been replaced.

    Raises:
        SeamError: TRL did not call the function for its reference exactly as often as expected.
    """
    module = sys.modules[patch_point.owner.__module__]
    original = getattr(module, _LOADER)
    replaced = 0
    policy_seen = False

    def load(model_id: str, *args: Any, **kwargs: Any) -> Any:
        nonlocal replaced, policy_seen
        # TRL loads the policy before it calls `Trainer.__init__`, which sets `trainer.model`, and the reference after
        # it.
        policy = getattr(trainer, "model", None)
        if policy is not None and model_id == get_config_model_id(policy.config):
            replaced += 1
            return reference()
        loaded = original(model_id, *args, **kwargs)
        if policy is None and not policy_seen:
            policy_seen = True
            policy_loaded(loaded)
        return loaded

    setattr(module, _LOADER, load)
    try:
        yield
    finally:
        setattr(module, _LOADER, original)
    if replaced != expected():
        raise unsupported_trl(
            f"{patch_point.owner.__name__} was expected to load {expected()} reference model(s) while being "
            f"constructed and loaded {replaced}"
        )
