"""
Copies of `frozen` and `adapter` that another distribution registers under other names can do all that the originals
can: as the reference of a run, and as the source of a store.
"""

import ast
import re
from pathlib import Path

import pytest
import torch

import trl_refplug
from trl_refplug import ConfigurationError, MissingRowError, ReferenceMismatchError
from trl_refplug.models import files as model_files
from trl_refplug.plugins import plugin_manager
from trl_refplug.store import LogProbStore, summarize

from .. import tiny
from ..trainers.runs import DATA, assert_same, build, train
from .test_cached import assert_close, lora


PACKAGE = Path(trl_refplug.__file__).parent
BUILT_IN = ("frozen", "adapter", "cached", "ema", "remote")
COPIED = ("frozen", "adapter", "named_model", "options", "trainer_scoring")

PLUGIN = """
from trl_refplug import hookimpl
import twin_options


@hookimpl
def refplug_register_providers(register):
    light = dict(options=twin_options.FrozenOptions, capabilities=twin_options.FROZEN_CAPABILITIES)
    register("twin", "twin_frozen:FrozenProvider", **light)
    register("twin-adapter", "twin_adapter:AdapterProvider")
"""


@pytest.fixture(autouse=True)
def _copies(site, monkeypatch):
    monkeypatch.setattr(model_files, "_SETTLED_SECONDS", 0.0)  # files count as settled at once
    modules = {
        f"twin_{name}": re.sub(
            r"trl_refplug\.providers\.(\w+)", r"twin_\1", (PACKAGE / "providers" / f"{name}.py").read_text()
        ).replace('provider="frozen"', 'provider="twin"')
        for name in COPIED
    }
    assert not any("trl_refplug.providers" in source for source in modules.values())
    site.install("twins", plugins={"twins": "twin_plugin"}, modules={**modules, "twin_plugin": PLUGIN})
    plugin_manager.cache_clear()
    yield
    plugin_manager.cache_clear()


def cached(path, source, fill="ahead", **source_kwargs):
    options = {"path": str(path), "source": source, "source_kwargs": source_kwargs, "fill": fill}
    return {"ref_provider": "cached", "ref_provider_kwargs": options}


def loaded(trainer):
    return bool(list(trainer.ref_model.parameters()))


class TestAsReference:
    @pytest.mark.parametrize("kind", ["dpo", "kto", "grpo"])
    def test_equals_the_original(self, kind, tmp_path):
        runs = [
            train(kind, tmp_path, tiny.saved(tmp_path), args={"ref_provider": name}) for name in ("twin", "frozen")
        ]
        assert_same(*runs)

    def test_takes_a_reference_model(self, tmp_path):
        given = {"ref_model": tiny.model(seed=1)}
        runs = [
            train("dpo", tmp_path, tiny.saved(tmp_path), args={"ref_provider": name}, **given)
            for name in ("twin", "frozen")
        ]
        assert_same(*runs)
        with pytest.raises(ConfigurationError, match=r"takes one: .*\btwin\b"):
            build("dpo", tmp_path, tiny.saved(tmp_path), args={"ref_provider": "twin-adapter"}, **given)

    def test_adapter_equals_the_original(self, tmp_path):
        runs = [
            train("dpo", tmp_path, tiny.saved(tmp_path), args={"ref_provider": name}, peft_config=lora())
            for name in ("twin-adapter", "adapter")
        ]
        assert_same(*runs)

    def test_trained_adapter_stays_a_reference(self, tmp_path):
        """The adapter that the trainer has added for it is used, and must not be removed."""
        for name in ("twin-adapter", "adapter"):
            given = {"args": {"ref_provider": name, "ref_provider_kwargs": {"start": "adapter"}}}
            trainer = build("dpo", tmp_path, tiny.saved(tmp_path), peft_config=lora(), **given)
            assert "ref" in trainer.model.peft_config


class TestAsSource:
    @pytest.mark.parametrize("source", ["twin", "frozen"])
    def test_named_model_is_loaded_late(self, source, tmp_path):
        path, named = tiny.saved(tmp_path), tiny.saved(tmp_path / "named", seed=1)
        first = train("dpo", tmp_path, path, args=cached(tmp_path / "store", source, model=named))
        assert loaded(first.trainer)
        for fill in ("ahead", "lazy", "never"):
            again = train("dpo", tmp_path, path, args=cached(tmp_path / "store", source, fill, model=named))
            assert not loaded(again.trainer)
            assert_same(again, first)

    def test_both_fill_the_same_store(self, tmp_path):
        """The same weights have the same keys, so what one provider has scored, the other need not score."""
        path = tiny.saved(tmp_path)
        first = train("dpo", tmp_path, path, args=cached(tmp_path / "store", "twin"))
        again = train("dpo", tmp_path, path, args=cached(tmp_path / "store", "frozen", "never"))
        assert_same(again, first)
        assert_close(first, train("dpo", tmp_path, path, args={"ref_provider": "frozen"}))

    def test_fills_with_as_many_forward_passes(self, tmp_path):
        passes = {}
        for source in ("twin", "frozen"):
            trainer = build("dpo", tmp_path, tiny.saved(tmp_path), args=cached(tmp_path / source, source))
            scorer = trainer.ref_model.provider._source._bulk_scorer
            passes[source] = scorer.stats.forwards, scorer.stats.unique_tokens
            assert scorer.mode == "packed"
        assert passes["twin"] == passes["frozen"]

    @pytest.mark.parametrize("source", ["twin", "frozen"])
    def test_packed_values_have_keys_of_their_own(self, source, tmp_path):
        path = tiny.saved(tmp_path)
        options = {"scoring": "packed"}
        train("dpo", tmp_path, path, args=cached(tmp_path / "store", source, "lazy", **options))
        ahead = build("dpo", tmp_path, path, args=cached(tmp_path / "store", source))
        assert ahead.ref_model.provider.sample_check.rows > 0
        assert summarize(tmp_path / "store").rows == 24  # nothing was scored again under another key

    @pytest.mark.parametrize("source", ["twin", "frozen"])
    def test_stored_rows_are_verified(self, source, tmp_path):
        path, store = tiny.saved(tmp_path), tmp_path / "store"
        build("dpo", tmp_path, path, args=cached(store, source))
        with LogProbStore(store) as opened:
            keys = [key.tobytes() for key in opened._shards.shards[0].keys]
            values = opened.lookup(keys)
        with LogProbStore(tmp_path / "wrong", mode="a") as wrong:
            wrong.put(keys, [value + 1 for value in values])
        with pytest.raises(ReferenceMismatchError, match="scored again"):
            build("dpo", tmp_path, path, args=cached(tmp_path / "wrong", source))

    @pytest.mark.parametrize("source", ["twin-adapter", "adapter"])
    def test_policy_that_was_cast_scores_nothing(self, source, tmp_path):
        """Values that the policy scores in bfloat16 would be stored as if the reference had scored them in float32."""
        args = {**cached(tmp_path / "store", source, "lazy"), "bf16_full_eval": True}
        trainer = build("dpo", tmp_path, tiny.saved(tmp_path), args=args, peft_config=lora())
        with pytest.raises(MissingRowError, match=r"`bf16_full_eval=True` has cast the policy"):
            trainer.evaluate(DATA["dpo"](8))


def modules_outside_of_providers():
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0]
        if room not in ("providers",) and "plugin_template" not in path.parts:
            yield path


# Commands are for people, who know providers by name: `ema export`, and what is compared where nothing is said.
NAMED_FOR_PEOPLE = {
    "cli/ema.py": {"adapter"},  # what kind of thing was written
    "cli/main.py": {"ema"},  # `trl-refplug ema export`
    "cli/demo.py": {"adapter", "frozen"},  # a directory of the demo's; which provider to try next
    "compare/demo.py": {"adapter"},  # that directory
    "compare/provider_choice.py": {"adapter", "frozen", "cached"},  # what is compared where nothing is said
}


def test_no_module_outside_of_providers_names_a_built_in_one():
    found = {}
    for path in modules_outside_of_providers():
        tree = ast.parse(path.read_text())
        names = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value in BUILT_IN}
        where = str(path.relative_to(PACKAGE))
        if names - NAMED_FOR_PEOPLE.get(where, set()):
            found[where] = names
    assert found == {}


def test_no_provider_is_probed():
    """
    All that one part may ask of a provider is in the contract, so nobody has to look whether an attribute exists.
    """
    probes = re.compile(
        r"(hasattr|getattr)\((self\.)?_?(provider|source|reference|part|attached\.provider)\b(?!\.capabilities)"
    )
    found = [str(path) for path in PACKAGE.rglob("*.py") if probes.search(path.read_text())]
    assert found == []


def test_the_light_part_has_to_be_that_of_the_class(site):
    source = """
from trl_refplug import Capabilities, hookimpl
import twin_options

@hookimpl
def refplug_register_providers(register):
    register("odd", "twin_frozen:FrozenProvider", options=twin_options.EmaOptions)
    register("weak", "twin_frozen:FrozenProvider", capabilities=Capabilities())
"""
    site.install("odd", plugins={"odd": "odd_plugin"}, modules={"odd_plugin": source})
    plugin_manager.cache_clear()
    with pytest.raises(
        trl_refplug.PluginError, match=r"FrozenProvider\.Options is .*; it was registered with .*EmaOptions"
    ):
        plugin_manager().provider_class("odd")
    with pytest.raises(trl_refplug.PluginError, match=r"FrozenProvider\.capabilities are .*multimodal=True"):
        plugin_manager().provider_class("weak")


def test_listing_imports_no_provider_that_registered_its_light_part():
    assert plugin_manager().registered("twin").capabilities.multimodal
    assert plugin_manager().registered("twin").options.__name__ == "FrozenOptions"
    import sys

    assert "twin_frozen" not in sys.modules
    assert torch.is_tensor(torch.zeros(1))
