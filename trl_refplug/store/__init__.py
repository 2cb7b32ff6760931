"""
The log-prob store: an append-only map from the key of a row to the log-probs that a reference gave to its tokens.

```python
facts = ScoringFacts(identity_digest=identity.digest, attention_implementation="sdpa", scoring_mode="exact")
keys = [RowKey(facts, token_ids, scored_positions).digest() for token_ids, scored_positions in rows]

with LogProbStore("ref-store", mode="a", provenance={"identity": identity.to_dict()}) as store:
    missing = np.flatnonzero(~store.contains(keys))
    store.put([keys[i] for i in missing], score(missing))
    first_row = store.lookup(keys)[0]
```

`docs/store.md` specifies the files and what is guaranteed about them. Importing this package does not import torch.

- `store`: `LogProbStore`, which reads and writes a store
- `keys`: the key of a row, which covers everything that its log-probs depend on
- `format`: the bytes of a shard and of its manifest
- `folder`: where the files are, in a directory or under an fsspec URL
- `shards`: the shards that are published, and looking up rows in them
- `index`: the sorted keys of all published rows
- `write_buffer`: the rows that this process has put and not yet published
- `journal`: the same rows on disk, so that they survive if the process is killed
- `maintenance`: summarizing and verifying a store
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
