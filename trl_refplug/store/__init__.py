"""
The log-prob store: an append-only map from what a row is to the log-probs a reference gave it. Imports no torch.

```python
facts = ScoringFacts(identity_digest=identity.digest, attention_implementation="sdpa", scoring_mode="exact")
keys = [RowKey(facts, token_ids, scored_positions).digest() for token_ids, scored_positions in rows]

with LogProbStore("ref-store", mode="a", provenance={"identity": identity.to_dict()}) as store:
    missing = np.flatnonzero(~store.contains(keys))
    store.put([keys[i] for i in missing], score(missing))
    first_row = store.lookup(keys)[0]
```

`docs/store.md` specifies the files and what is guaranteed about them.
"""

from trl_refplug.store.format import FORMAT_VERSION, Manifest
from trl_refplug.store.keys import KEY_BYTES, RowKey, ScoringFacts, tail_scored_keys
from trl_refplug.store.maintenance import Conflict, StoreSummary, VerifyReport, summarize, verify
from trl_refplug.store.store import LogProbStore, StoreWarning


__all__ = [
    "FORMAT_VERSION",
    "KEY_BYTES",
    "Conflict",
    "LogProbStore",
    "Manifest",
    "RowKey",
    "ScoringFacts",
    "StoreSummary",
    "StoreWarning",
    "VerifyReport",
    "summarize",
    "tail_scored_keys",
    "verify",
]
