"""`remote` on two ranks, each of which asks the server itself."""

from ..serving.servers import engine, serving
from ..trainers.test_distributed import on_two_ranks


def test_two_ranks_equal_frozen(tmp_path):
    frozen = {"ref_provider": "frozen"}
    with serving(engine(scoring="exact")) as url:
        remote = {"ref_provider": "remote", "ref_provider_kwargs": {"url": url}}
        ranks = on_two_ranks(tmp_path, {"kind": "dpo", "args": frozen}, {"kind": "dpo", "args": remote})
    for theirs, ours in ranks:
        assert theirs["logs"] == ours["logs"]
        assert theirs["sums"] == ours["sums"]
