"""
Comparing what all ranks must agree on about the reference. This is done when the trainer has been built, and never
within a step.
"""

from __future__ import annotations

from typing import Any

from accelerate.utils import gather_object

from trl_refplug.errors import ReferenceMismatchError
from trl_refplug.plugins import plugin_manager
from trl_refplug.provider import ReferenceProvider


def compare_ranks(accelerator: Any, provider: ReferenceProvider, name: str) -> None:
    """
    Compare the provider, its version and the reference's identity between all ranks.

    Raises:
        ReferenceMismatchError: Ranks differ. It is raised on every rank, and names one that differs from rank 0.
    """
    if accelerator.num_processes == 1:
        return
    identity = provider.identity()
    mine = {
        "provider": name,
        "version": _version_of(provider, name),
        "identity": identity.digest,
        "reference": str(identity),
    }
    everyone = gather_object([mine])
    for rank, other in enumerate(everyone):
        for fact in ("provider", "version", "identity"):
            if other[fact] != everyone[0][fact]:
                raise ReferenceMismatchError(
                    f"Ranks disagree about the reference: rank 0 has {everyone[0]['reference']} "
                    f"(ref_provider={everyone[0]['provider']!r}, {everyone[0]['version']}), rank {rank} has "
                    f"{other['reference']} (ref_provider={other['provider']!r}, {other['version']}). "
                    "Every rank must see the same packages, model files "
                    "and arguments."
                )


def _version_of(provider: ReferenceProvider, name: str) -> str:
    registered = plugin_manager().providers.get(name)
    if registered is not None:
        return f"{registered.plugin.distribution} {registered.plugin.version}"
    return type(provider).__module__
