"""Reference flags, checked before anything slow begins."""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from trl_refplug.arguments import ReferenceArguments


def check_reference(args: ReferenceArguments, *, policy_is_peft: bool, online: bool) -> None:
    """
    Refuse an unknown provider and options that do not fit it.

    Raises:
        RefPlugError: What the trainer would raise later, after loading a model and data.
    """
    from trl_refplug.trainers.selection import Selection, make_provider, select_name

    name = select_name(Selection(args=args, policy_is_peft=policy_is_peft, has_ref_model=False, online=online))
    make_provider(name, args.ref_provider_kwargs).close()
