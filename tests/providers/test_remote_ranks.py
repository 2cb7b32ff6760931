"""Two ranks, each of which speaks for itself."""

import json

from ..serving.servers import engine, serving
from ..trainers.test_distributed import torchrun


def test_two_ranks_equal_frozen(tmp_path):
    frozen = {"ref_provider": "frozen"}
    with serving(engine(scoring="exact")) as url:
        remote = {"ref_provider": "remote", "ref_provider_kwargs": {"url": url}}
        done = torchrun(tmp_path, {"kind": "dpo", "args": frozen}, {"kind": "dpo", "args": remote})
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        theirs, ours = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert theirs["logs"] == ours["logs"]
        assert theirs["sums"] == ours["sums"]
