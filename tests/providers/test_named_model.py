"""A model that an option names is loaded if a row has to be scored, and not in order to look rows up."""

import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from trl_refplug import MissingRowError, ReferenceMismatchError
from trl_refplug.models import files as model_files

from .. import tiny
from ..trainers.runs import DATA, assert_same, build, train


@pytest.fixture(autouse=True)
def _settled(monkeypatch):
    """Files may be remembered at once, so that tests need not wait until they are old enough."""
    monkeypatch.setattr(model_files, "_SETTLED_SECONDS", 0.0)


@pytest.fixture
def policy(tmp_path):
    return tiny.saved(tmp_path)


@pytest.fixture
def named(tmp_path):
    return tiny.saved(tmp_path / "named", seed=1)


@pytest.fixture
def use(tmp_path, named):
    def arguments(fill="ahead", source=None, **options):
        source_kwargs = {"model": named, **(source or {})}
        kwargs = {"path": str(tmp_path / "store"), "fill": fill, "source": "frozen", "source_kwargs": source_kwargs}
        return {"ref_provider": "cached", "ref_provider_kwargs": {**kwargs, **options}}

    return arguments


def loaded(trainer):
    return bool(list(trainer.ref_model.parameters()))


def entries():
    return list(Path(os.environ["XDG_CACHE_HOME"]).glob("trl-refplug/models/*.json"))


@pytest.mark.parametrize("fill", ["ahead", "lazy", "never"])
def test_not_loaded_where_all_rows_are_there(fill, tmp_path, policy, use):
    first = train("dpo", tmp_path, policy, args=use())
    assert loaded(first.trainer)
    state = torch.get_rng_state()
    again = train("dpo", tmp_path, policy, args=use(fill))
    assert not loaded(again.trainer)
    assert_same(again, first)
    assert torch.equal(torch.get_rng_state(), state)
    assert again.trainer.ref_model.provider.identity() == first.trainer.ref_model.provider.identity()


def test_loaded_for_the_rows_that_are_missing(tmp_path, policy, use, named):
    build("dpo", tmp_path, policy, args=use(), train_dataset=DATA["dpo"](4))
    run = train("dpo", tmp_path, policy, args=use())
    assert loaded(run.trainer)
    frozen = {"ref_provider": "frozen", "ref_provider_kwargs": {"model": named}}
    expected = train("dpo", tmp_path, policy, args=frozen)
    for ours, theirs in zip(run.logs, expected.logs, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)


@pytest.mark.parametrize("fill", ["ahead", "lazy"])
def test_loaded_after_training_began(fill, tmp_path, policy, use, named):
    """
    It is loaded for rows that come late. The policy, which has moved, is not asked, and no random number is drawn.
    """
    build("dpo", tmp_path, policy, args=use())
    other = DATA["dpo"](30).select(range(12, 30))
    results = []
    for args in (use(fill), {"ref_provider": "frozen", "ref_provider_kwargs": {"model": named}}):
        trainer = build("dpo", tmp_path, policy, args=args)
        trainer.train()
        results.append((trainer.evaluate(other)["eval_loss"], torch.get_rng_state()))
        assert loaded(trainer)
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-4)
    assert torch.equal(results[0][1], results[1][1])


def test_loaded_to_verify_only_if_asked_to(tmp_path, policy, use):
    build("dpo", tmp_path, policy, args=use())
    assert build("dpo", tmp_path, policy, args=use()).ref_model.provider.sample_check is None
    trainer = build("dpo", tmp_path, policy, args=use("never", verify=5))
    assert trainer.ref_model.provider.sample_check.rows == 5
    assert loaded(trainer)


class TestNeverStale:
    def rewrite(self, named):
        """Write other weights into a file, and keep its name, size and modification time."""
        weights = Path(named) / "model.safetensors"
        before = weights.stat()
        tiny.model(seed=2).save_pretrained(Path(named) / "other")
        weights.write_bytes((Path(named) / "other" / "model.safetensors").read_bytes())
        assert weights.stat().st_size == before.st_size
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))

    def test_other_weights(self, tmp_path, policy, use, named):
        build("dpo", tmp_path, policy, args=use())
        self.rewrite(named)
        with pytest.raises(MissingRowError):
            build("dpo", tmp_path, policy, args=use("never"))

    def test_other_config(self, tmp_path, policy, use, named):
        build("dpo", tmp_path, policy, args=use())
        config = Path(named) / "config.json"
        values = json.loads(config.read_text())
        values["rms_norm_eps"] = 1e-3
        config.write_text(json.dumps(values))
        with pytest.raises(MissingRowError):
            build("dpo", tmp_path, policy, args=use("never"))

    @pytest.mark.parametrize(
        ("source", "args"),
        [
            ({"dtype": "bfloat16"}, {}),
            ({}, {"model_init_kwargs": {"attn_implementation": "eager"}}),
        ],
        ids=str,
    )
    def test_loaded_otherwise(self, source, args, tmp_path, policy, use):
        build("dpo", tmp_path, policy, args=use())
        with pytest.raises(MissingRowError):
            build("dpo", tmp_path, policy, args={**use("never", source), **args})

    def test_files_that_have_just_changed(self, tmp_path, policy, use, named, monkeypatch):
        monkeypatch.setattr(model_files, "_SETTLED_SECONDS", 3600.0)
        build("dpo", tmp_path, policy, args=use())
        assert not entries()
        assert loaded(build("dpo", tmp_path, policy, args=use("never")))

    def test_the_base_of_an_adapter_is_elsewhere(self, tmp_path, policy, named):
        lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
        model = tiny.model().from_pretrained(named)
        get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
        assert model_files.fingerprint_files(str(tmp_path / "adapter"), None, {}) is None
        assert model_files.fingerprint_files(named, None, {}) is not None

    def test_what_is_remembered_is_wrong(self, tmp_path, policy, use):
        """The model is compared with what was remembered of it before it scores anything."""
        build("dpo", tmp_path, policy, args=use())
        (entry,) = entries()
        values = json.loads(entry.read_text())
        values["facts"]["identity"]["digest"] = "0" * 32
        entry.write_text(json.dumps(values))
        with pytest.raises(MissingRowError):
            build("dpo", tmp_path, policy, args=use("never"))
        with pytest.raises(ReferenceMismatchError, match="run again"):
            build("dpo", tmp_path, policy, args=use())
        build("dpo", tmp_path, policy, args=use("never"))

    @pytest.mark.parametrize("content", ["", "{}", "[]", '{"known_by": 1, "facts": {}}'])
    def test_entries_that_are_none(self, content, tmp_path, policy, use):
        build("dpo", tmp_path, policy, args=use())
        (entry,) = entries()
        entry.write_text(content)
        assert loaded(build("dpo", tmp_path, policy, args=use("never")))

    def test_moved_directory(self, tmp_path, policy, use, named):
        build("dpo", tmp_path, policy, args=use())
        elsewhere = shutil.copytree(named, tmp_path / "elsewhere")
        trainer = build("dpo", tmp_path, policy, args=use("never", {"model": str(elsewhere)}))
        assert loaded(trainer)  # the digest is the same, but had to be computed again

    def test_nowhere_to_remember(self, tmp_path, policy, use, monkeypatch):
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        for _ in range(2):
            assert loaded(build("dpo", tmp_path, policy, args=use()))


def remember_many(cache, seed):
    os.environ["XDG_CACHE_HOME"] = cache
    for number in range(300):
        key = str(number % 3)
        model_files.save_facts(key, {"identity": key * 1000})
        found = model_files.load_facts(key)
        assert found == {"identity": key * 1000}, found


def test_many_processes_remember_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=remember_many, args=(str(tmp_path), seed)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(list(tmp_path.glob("**/*.json"))) == len(list(tmp_path.glob("trl-refplug/models/*"))) == 3


def test_settled(named, monkeypatch):
    monkeypatch.setattr(model_files, "_SETTLED_SECONDS", 3600.0)
    assert model_files.fingerprint_files(named, None, {}) is None
    monkeypatch.setattr(model_files, "_SETTLED_SECONDS", 0.1)
    time.sleep(0.2)
    assert model_files.fingerprint_files(named, None, {}) is not None
