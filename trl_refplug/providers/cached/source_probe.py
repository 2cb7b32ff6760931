"""The probe of a store: the reference that scores rows is the one whose rows the store has, and stays it."""

from __future__ import annotations

import torch

from trl_refplug.errors import ReferenceMismatchError
from trl_refplug.models.probe import Probe, probe_batch
from trl_refplug.models.tolerances import Tolerance
from trl_refplug.models.weights import WeightMark, changed_weights, mark_weights
from trl_refplug.provider import ReferenceContext, ReferenceProvider
from trl_refplug.providers.trainer_scoring import trainer_precision
from trl_refplug.store import LogProbStore


class SourceProbe:
    """
    What the source of a store says about the probe.

    Args:
        context ([`ReferenceContext`]): The context of the run, after its trainer is built.
        source ([`ReferenceProvider`]): The provider that scores rows.
        tolerance ([`Tolerance`]): How much two answers to the same row may differ.
    """

    def __init__(self, context: ReferenceContext, source: ReferenceProvider, tolerance: Tolerance) -> None:
        self._context = context
        self._source = source
        self._tolerance = tolerance
        self._said: Probe | None = None
        self._marks: dict[str, WeightMark] = {}  # of the weights that the source scores with

    def compare_with(self, store: LogProbStore, *, scoring: bool = False) -> None:
        """
        Ask the source about the probe, and compare its answers with those in the store, which are from the reference
        that scored the stored rows.

        Args:
            scoring (`bool`): Whether rows are going to be scored. If not, a source is not asked if it would have to
                load a model or ask a server for that.

        Raises:
            ReferenceMismatchError: The store has rows of another reference that has the same identity.
        """
        rows = self._context.probe_rows
        if self._said is not None or rows is None:
            return
        batch = probe_batch(rows, self._context.accelerator.device)
        with torch.no_grad(), trainer_precision(self._context.accelerator):
            found = self._source.log_probs(batch) if scoring else self._source.probe(batch)
        if found is None:
            return
        self._said = probe = Probe(rows, found.float().cpu(), "the source")
        self._marks = mark_weights(self._source.weights())
        digest = self._source.identity().digest
        for said in store.provenances:
            if "probe" in said and said.get("reference", {}).get("digest") == digest:
                largest, mean = probe.difference_where_asked(Probe.from_dict(said["probe"]))
                if not self._tolerance.allows(largest, mean):
                    raise ReferenceMismatchError(
                        f"The store {store.location!r} has log-probs of a reference that goes by the same identity, "
                        f"{self._source.identity()}, but is another one: on the same rows of text the two differ by "
                        f"up to {largest:.3g} nats per token (tolerance {self._tolerance.largest:g}), {mean:.3g} on "
                        f"average (tolerance {self._tolerance.mean:g}). Use another `path`, or the reference that the "
                        "store was filled with."
                    )
        if store.mode == "a":
            store.add_provenance(probe=probe.to_dict())

    def refuse_moved_source(self, store: LogProbStore) -> None:
        """What a source scores while training goes on is stored for later runs, so it must be what it was."""
        if self._said is None:
            return
        with torch.no_grad(), trainer_precision(self._context.accelerator):
            found = self._source.probe(probe_batch(self._said.rows, self._context.accelerator.device))
        changed, rounded = changed_weights(self._marks, self._source.weights())
        moved = found is not None and not self._tolerance.allows(*self._said.difference(found))
        if moved or (changed and not rounded):
            shown = f" ({len(changed)} weights were changed: {changed[0]}, ...)" if changed else ""
            raise ReferenceMismatchError(
                f"The reference {self._source.identity()}, which scores rows that {store.location!r} misses while "
                f"training goes on, is not what it was when training began{shown}. Nothing of this batch was stored. "
                "A callback, or the code around the trainer, changed it: remove what does, or use a source that "
                'shares nothing with the policy: {"source": "frozen"}.'
            )
