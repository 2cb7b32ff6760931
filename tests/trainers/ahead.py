"""A reference that can be asked ahead of time without a second device: a frozen copy on the same CPU, in a thread."""

from __future__ import annotations

from trl_refplug.providers.frozen import FrozenOptions, FrozenProvider


class Ahead(FrozenProvider):
    """
    Counts how often it is asked: `afresh` when the answer is needed, and `ahead` of that. `most` is the largest number
    of answers that were not used yet at one time.
    """

    def __init__(self):
        super().__init__(FrozenOptions(device="cpu"))
        self.afresh = 0
        self.asked = []
        self.most = 0
        self.futures = []

    def __deepcopy__(self, memo):
        return self  # `build` copies what it is given; the tests look at this one

    def _has_own_device(self, context):
        return True

    @property
    def ahead(self):
        return len(self.asked)

    def log_probs(self, batch):
        self.afresh += 1
        return super().submit(batch).result()

    def probe(self, batch):
        # This is not a question of training's, so it is not counted.
        return super().log_probs(batch) if self._thread is None else super().submit(batch).result()

    def submit(self, batch):
        self.asked.append(batch.input_ids.clone())
        self.most = max(self.most, self.ahead - self.used)
        future = super().submit(batch)
        self.futures.append(future)
        return future

    @property
    def used(self):
        return self.trainer.ref_model.calls - self.afresh
