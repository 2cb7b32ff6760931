"""Two real processes with gloo on the CPU, started as torchrun starts them."""

import math

import pytest

from trl_refplug.store import verify
from trl_refplug.testing.ranks import RankFailedError, launch

from .. import tiny
from . import two_ranks


def on_two_ranks(tmp_path, *jobs):
    """The results of every job, by rank."""
    common = {"out": str(tmp_path), "model": tiny.saved(tmp_path), "ours": True}
    ranks = launch(two_ranks.run_all, [{**common, **job} for job in jobs])
    return [ranks[0], ranks[1]]


def test_two_ranks_equal_trl(tmp_path):
    cases = [("dpo", "frozen", False), ("dpo", "adapter", True), ("grpo", "frozen", False), ("grpo", "adapter", True)]
    jobs = []
    for kind, provider, lora in cases:
        jobs.append({"kind": kind, "lora": lora, "args": {"ref_provider": provider}})
        jobs.append({"kind": kind, "lora": lora, "ours": False})
    ranks = on_two_ranks(tmp_path, *jobs)
    for results in ranks:
        for case, ours, theirs in zip(cases, results[::2], results[1::2], strict=True):
            assert ours == theirs, case
    assert ranks[0][0]["logs"]
    assert ranks[0][0]["sums"] == ranks[1][0]["sums"]


def test_online_references_are_hidden_and_the_drift_is_measured_on_two_ranks(tmp_path):
    """Both trainers, a reference on a thread of its own, whole generation batches: TRL's numbers on both ranks."""
    args = {"steps_per_generation": 2, "num_iterations": 2, "max_steps": 4}
    args |= {"eval_strategy": "steps", "eval_steps": 2}
    jobs = []
    for kind in ("grpo", "rloo"):
        job = {"kind": kind, "eval_rows": 4}
        jobs.append({**job, "reference": "Ahead", "args": {**args, "ref_monitor_steps": 1}})
        jobs.append({**job, "ours": False, "args": args})
        jobs.append({**job, "args": {**args, "beta": 0.0, "ref_monitor_steps": 1}})
        jobs.append({**job, "ours": False, "args": {**args, "beta": 0.0}})
    for results in on_two_ranks(tmp_path, *jobs):
        for ours, theirs in zip(results[::2], results[1::2], strict=True):
            assert theirs["logs"]
            assert (ours["logs"], ours["sums"]) == (theirs["logs"], theirs["sums"])
        assert all(results[asked]["ahead"] > 0 for asked in (0, 4))


def sharded(tmp_path, *jobs):
    """The results of rank 0 for every job, run under FSDP2."""
    results, _ = on_two_ranks(tmp_path, *({"fsdp": True, **job} for job in jobs))
    assert all(result["sharded"] for result in results)
    return results


def test_sharded_policies_equal_trl(tmp_path):
    cases = [("dpo", "frozen", False), ("kto", "frozen", False), ("grpo", "frozen", False), ("rloo", "frozen", False)]
    cases += [("dpo", "adapter", True), ("dpo", "frozen", True), ("grpo", "adapter", True)]
    jobs = []
    for kind, provider, lora in cases:
        jobs.append({"kind": kind, "lora": lora, "args": {"ref_provider": provider, "ref_monitor_steps": 2}})
        jobs.append({"kind": kind, "lora": lora, "ours": False})
    results = sharded(tmp_path, *jobs)
    for case, ours, theirs in zip(cases, results[::2], results[1::2], strict=True):
        assert theirs["logs"]
        assert ours == theirs, case


def test_an_edited_sharded_policy_is_its_own_reference(tmp_path):
    (result,) = sharded(tmp_path, {"kind": "dpo", "edit": True})
    assert result["logs"][0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_sharded_policies_in_mixed_precision_equal_trl(tmp_path):
    """FSDP2 casts what a model returns, so TRL's own log-probs are rounded to bfloat16, policy and reference alike."""
    using = {"ref_provider": "cached", "ref_provider_kwargs": {"path": str(tmp_path / "store")}}
    mixed = {"bf16": True, "model_init_kwargs": {"dtype": "bfloat16"}}  # FSDP2 upcasts the weights of such a model
    cases = [("dpo", "frozen", False), ("dpo", "adapter", True), ("grpo", "frozen", False)]
    jobs = []
    for kind, provider, lora in cases:
        jobs.append({"kind": kind, "lora": lora, "args": {**mixed, "ref_provider": provider}})
        jobs.append({"kind": kind, "lora": lora, "ours": False, "args": mixed})
    filling, filled = ({"kind": "dpo", "args": {**mixed, **using}} for _ in range(2))
    *results, filling, filled = sharded(tmp_path, *jobs, filling, filled)
    for case, ours, theirs in zip(cases, results[::2], results[1::2], strict=True):
        assert theirs["logs"]
        assert ours == theirs, case
    assert filled["logs"] == filling["logs"]
    for ours, frozen in zip(filling["logs"], results[0]["logs"], strict=True):
        assert ours["loss"] == pytest.approx(frozen["loss"], abs=0.05)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_sharded_policy_fills_a_store(lora, tmp_path):
    """The parts of the ranks differ in size, so one goes on when the other is done."""
    store = tmp_path / "store"
    using = {"ref_provider": "cached", "ref_provider_kwargs": {"path": str(store)}}
    never = {"ref_provider": "cached", "ref_provider_kwargs": {"path": str(store), "fill": "never"}}
    job = {"kind": "dpo", "rows": 150, "lora": lora}
    frozen, filling, filled, again = sharded(
        tmp_path,
        {**job, "args": {"ref_provider": "frozen"}},
        {**job, "args": using},
        {**job, "args": never},
        {**job, "args": using},
    )
    report = verify(store)
    assert (report.rows, report.duplicates) == (300, 0)  # each rank scored its part, and the last run scored nothing
    for ours, theirs in zip(filling["logs"], frozen["logs"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["num_tokens"] == theirs["num_tokens"]  # the same rows in the same order
    assert filled["logs"] == filling["logs"] == again["logs"]


def test_a_sharded_average_goes_on_after_resume(tmp_path):
    args = {"ref_provider": "ema", "ref_provider_kwargs": {"sync_steps": 2, "alpha": 0.5}}
    args |= {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    job = {"kind": "dpo", "args": args}
    checkpoint = str(tmp_path / "sharded" / "checkpoint-3")
    frozen, whole, resumed = sharded(
        tmp_path, {"kind": "dpo", "args": {"max_steps": 6}}, job, {**job, "resume": checkpoint}
    )
    assert [entry["loss"] for entry in resumed["logs"]] == [entry["loss"] for entry in whole["logs"]]
    assert resumed["sums"] == whole["sums"]
    assert whole["sums"] != frozen["sums"]


def test_ranks_that_disagree_stop(tmp_path):
    with pytest.raises(RankFailedError) as caught:
        on_two_ranks(tmp_path, {"kind": "dpo", "reference": "PerRank"})
    assert "Ranks disagree about the reference: rank 0 has per-rank[0]" in caught.value.message
    assert "rank 1 has per-rank[1]" in caught.value.message


def test_one_ranks_failure_ends_the_job(tmp_path):
    with pytest.raises(RankFailedError, match=r"Rank 1 of two failed: .*the reference of rank 1 is on fire"):
        on_two_ranks(tmp_path, {"kind": "dpo", "reference": "BrokenOnOne"})


def test_looking_ahead_changes_nothing(tmp_path):
    """
    Accelerate cuts the metrics of the uneven last batch by what it knows of the loader, which is read ahead here.
    """
    epochs = {"num_train_epochs": 2, "max_steps": -1, "per_device_train_batch_size": 2}
    stream = {"max_steps": 5, "accelerator_config": {"dispatch_batches": True, "split_batches": True}}
    cases = [
        ("dpo", {"rows": 15, "args": epochs}),
        ("dpo", {"rows": 13, "args": {**epochs, "gradient_accumulation_steps": 2, "ref_prefetch": 9}}),
        ("kto", {"rows": 7, "args": epochs}),
        ("dpo", {"rows": 16, "stream": True, "args": stream}),
    ]
    jobs = []
    for kind, job in cases:
        for prefetch in (job["args"].get("ref_prefetch", 2), 0):
            jobs.append({**job, "kind": kind, "reference": "Ahead", "args": {**job["args"], "ref_prefetch": prefetch}})
    on_one = {"rows": 15, "kind": "dpo", "reference": "AheadOnOne", "args": epochs}
    for rank, (*results, last) in enumerate(on_two_ranks(tmp_path, *jobs, on_one)):
        assert last["logs"] == results[0]["logs"]
        calls = results[0]["ahead"] + results[0]["afresh"]
        # Nothing is prefetched. On rank 0, `log_probs` uses the thread.
        assert last["ahead"] == (calls if rank == 0 else 0)
        for case, ahead, afresh in zip(cases, results[::2], results[1::2], strict=True):
            assert (ahead["logs"], ahead["sums"]) == (afresh["logs"], afresh["sums"]), case
            assert ahead["ahead"] > 0, case
            assert afresh["ahead"] == 0, case
