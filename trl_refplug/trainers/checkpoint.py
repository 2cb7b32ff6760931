"""Writing what a checkpoint says about the reference, and comparing a resumed run's reference with it."""

from __future__ import annotations

import json
import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trl_refplug.errors import ReferenceMismatchError
from trl_refplug.provider import STATE_DIRECTORY, ReferenceIdentity, ReferenceProvider


logger = logging.getLogger("trl_refplug")

_RECORD = "refplug/reference.json"


def write_to_checkpoint(
    checkpoint: str, provider: ReferenceProvider, name: str, probe: Any, *, main_process: bool
) -> None:
    """
    Write a record of the reference, and the provider's state, into a checkpoint that is being written.

    Args:
        probe: The reference's answers to the probe, as JSON values.
    """
    state = Path(checkpoint) / STATE_DIRECTORY
    state.mkdir(parents=True, exist_ok=True)
    provider.save_state(state)
    if main_process:
        record = {
            "provider": name,
            "identity": provider.identity().to_dict(),
            "metadata": provider.metadata(),
            "probe": probe,
            "versions": {package: version(package) for package in ("trl", "transformers", "peft", "torch")},
        }
        (Path(checkpoint) / _RECORD).write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")


def compare_with_checkpoint(checkpoint: str, provider: ReferenceProvider) -> Any:
    """
    Refuse to go on with another reference than the one the checkpoint was trained with. If it is the same, restore the
    provider's state.

    Returns:
        The answers to the probe that the checkpoint has, as JSON values; `None` if it has none.

    Raises:
        ReferenceMismatchError: The identities differ, or a moving reference's state is missing.
    """
    record_file = Path(checkpoint) / _RECORD
    if not record_file.is_file():
        if provider.capabilities.moving:
            raise ReferenceMismatchError(
                f"{checkpoint} has no reference state ({_RECORD}), so the moving reference cannot go on "
                "where it was. Start anew, or resume from a checkpoint written with this provider."
            )
        logger.warning(
            "%s does not say which reference it was trained with (it was written without trl-refplug); going on with "
            "%s.",
            checkpoint,
            provider.identity(),
        )
        return None
    record = _read(record_file)
    saved = ReferenceIdentity.from_dict(record["identity"])
    current = provider.identity()
    if saved.digest != current.digest:
        raise ReferenceMismatchError(
            f"{checkpoint} was trained against the reference {saved}, and this run has {current}: "
            f"{_difference(saved, current)}"
        )
    provider.load_state(Path(checkpoint) / STATE_DIRECTORY)
    return record.get("probe")


def _difference(saved: ReferenceIdentity, current: ReferenceIdentity) -> str:
    """What to do about two identities that differ. What differs in the details for people is named."""
    if saved.provider != current.provider:
        return f"another provider. Use --ref_provider {saved.provider}, or start anew."
    values = {**saved.details, **current.details}
    names = [name for name in values if saved.details.get(name) != current.details.get(name)]
    was, now = (", ".join(f"{name}={identity.details.get(name)}" for name in names) for identity in (saved, current))
    what = f"it had {was}, and has {now} now" if names else "another model, revision, adapter or precision"
    return (
        f"{what}. Pass the policy as it was passed when training started (not the checkpoint itself: "
        "`resume_from_checkpoint` loads that), and the same reference options."
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return values
    except (json.JSONDecodeError, OSError) as error:
        raise ReferenceMismatchError(f"{path} cannot be read ({error}); the checkpoint is damaged.") from error
