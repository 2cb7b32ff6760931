"""Finding, isolating, blocking and resolving plugins. `tests/cli/test_plugins.py` does it with pip-installed ones."""

import gc
import itertools
import sys
import traceback
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import trl_refplug
from tests.conftest import FakeSite
from trl_refplug import PluginError, ReferenceIdentity, ReferenceProvider, RefPlugWarning, UnknownProviderError
from trl_refplug.plugins import PluginManager, PluginRecord, plugin_manager
from trl_refplug.plugins.installed import canonical
from trl_refplug.trainers.selection import Selection


UNDECIDED = Selection(args=SimpleNamespace(), policy_is_peft=False, has_ref_model=False, online=False)
"""A selection that TRL's own arguments leave open, so that plugins are asked."""


PROVIDER = """
from trl_refplug import ReferenceIdentity, ReferenceProvider, hookimpl

class Provider(ReferenceProvider):
    def identity(self):
        return ReferenceIdentity("uniform", "00")

    def log_probs(self, batch):
        raise NotImplementedError
"""


def registering(*names: str) -> str:
    """The source of a plugin that registers providers with these names."""
    calls = "".join(f"    register({name!r}, Provider)\n" for name in names)
    return f"{PROVIDER}\n@hookimpl\ndef refplug_register_providers(register):\n{calls}"


def record_of(manager: PluginManager, name: str) -> PluginRecord:
    (record,) = (record for record in manager.records if record.name == name)
    return record


def test_built_in_providers_come_from_a_plugin_like_any_other() -> None:
    builtin = PluginManager().records[0]
    assert (builtin.name, builtin.distribution, builtin.status) == ("builtin", "trl-refplug", "ok")
    assert builtin.version == trl_refplug.__version__
    assert {"frozen", "adapter"} <= set(builtin.providers)
    assert PluginManager().provider_class("frozen").__name__ == "FrozenProvider"


def test_the_manager_of_the_process_is_made_once() -> None:
    assert plugin_manager() is plugin_manager()


def test_sound_plugin(site: FakeSite) -> None:
    site.install(
        "acme-refs", "1.2", plugins={"acme": "acme_mod"}, modules={"acme_mod": registering("uniform", "other")}
    )
    manager = PluginManager()
    record = record_of(manager, "acme")
    assert (record.status, record.reason, record.exception) == ("ok", "", None)
    assert (record.distribution, record.version, record.value) == ("acme-refs", "1.2", "acme_mod")
    assert record.location == str(site.path / "acme_mod.py")
    assert record.providers == ("uniform", "other")
    assert issubclass(manager.provider_class("uniform"), ReferenceProvider)
    assert manager.providers["uniform"].plugin is record


def test_plugin_may_be_an_instance(site: FakeSite) -> None:
    source = f"""{PROVIDER}
class Plugin:
    API_VERSION = 1

    def __init__(self, name):
        self.name = name

    @hookimpl
    def refplug_register_providers(self, register):
        register(self.name, Provider)

plugin = Plugin("uniform")
newer = Plugin("newer")
newer.API_VERSION = 2
"""
    plugins = {"acme": "acme_mod:plugin", "acme2": "acme_mod:newer"}
    site.install("acme-refs", plugins=plugins, modules={"acme_mod": source})
    manager = PluginManager()
    assert record_of(manager, "acme").providers == ("uniform",)
    assert record_of(manager, "acme2").status == "incompatible"


LAZY = """
from trl_refplug import hookimpl

@hookimpl
def refplug_register_providers(register):
    register("uniform", "acme_lazy:Provider")
"""


def test_lazy_target_is_imported_when_it_is_asked_for(site: FakeSite) -> None:
    site.install("acme-refs", plugins={"acme": "acme_mod"}, modules={"acme_mod": LAZY, "acme_lazy": PROVIDER})
    manager = PluginManager()
    assert "uniform" in manager.providers
    assert "acme_lazy" not in sys.modules
    assert manager.provider_class("uniform") is sys.modules["acme_lazy"].Provider


@pytest.mark.parametrize(
    ("module", "told"),
    [
        ("import missing_dependency", "ModuleNotFoundError: No module named 'missing_dependency'."),
        ("", "'acme_lazy' has no attribute 'Provider'"),
        ("class Provider: pass", "expected a subclass of trl_refplug.ReferenceProvider"),
        (
            "from trl_refplug import ReferenceProvider\nclass Provider(ReferenceProvider): pass",
            "Provider does not define identity(), log_probs().",
        ),
        (f"{PROVIDER}\nProvider.Options = dict", "Provider.Options = <class 'dict'>; expected a dataclass."),
        (f"{PROVIDER}\nProvider.capabilities = {{}}", "Provider.capabilities = {}; expected Capabilities."),
        ("raise SystemExit(3)", "SystemExit: 3."),
    ],
)
def test_unusable_lazy_target_names_plugin_distribution_and_target(site: FakeSite, module: str, told: str) -> None:
    site.install("acme-refs", "1.2", plugins={"acme": "acme_mod"}, modules={"acme_mod": LAZY, "acme_lazy": module})
    manager = PluginManager()
    with pytest.raises(PluginError) as caught:
        manager.provider_class("uniform")
    message = str(caught.value)
    assert "Provider 'uniform' (acme_lazy:Provider) of the plugin 'acme' of acme-refs 1.2" in message
    assert told in message
    manager.provider_class("frozen")


@pytest.mark.parametrize(
    ("module", "told"),
    [
        (PROVIDER, ""),
        ("if True:\n    Provider = 1", ""),  # this may be right, and only an import would tell
        ("from somewhere_else import *", "acme_lazy imports 'somewhere_else', which is not installed"),
        ("import missing_dependency", "acme_lazy imports 'missing_dependency', which is not installed"),
        ("try:\n    import missing\nexcept ImportError:\n    missing = None", ""),
        ("class Provide: pass", "acme_lazy has no 'Provider'. Did you mean 'Provide'?"),
        ("class Provider(", "SyntaxError in "),
        (None, "there is no module 'acme_lazy'"),
    ],
)
def test_what_the_source_of_a_lazy_target_tells(site: FakeSite, module: str | None, told: str) -> None:
    modules = {"acme_mod": LAZY} | ({} if module is None else {"acme_lazy": module})
    site.install("acme-refs", plugins={"acme": "acme_mod"}, modules=modules)
    problem = PluginManager().providers["uniform"].problem()
    assert told in problem
    assert bool(problem) == bool(told)
    assert "acme_lazy" not in sys.modules


def test_built_in_targets_are_there() -> None:
    assert {
        name: provider.problem() for name, provider in PluginManager().providers.items() if provider.problem()
    } == {}


HOOK = "from trl_refplug import hookimpl\n@hookimpl"

HOOK_ONLY = f"{HOOK}\ndef refplug_scored(): pass"

BROKEN = {
    "import error": ("import nowhere_to_be_found", "ModuleNotFoundError: No module named 'nowhere_to_be_found'."),
    "syntax error": ("def :", "SyntaxError"),
    "exit at import": ("raise SystemExit('bye')", "SystemExit: bye."),
    "raising hook": (
        f"{HOOK}\ndef refplug_register_providers(register): 1 / 0",
        "ZeroDivisionError: division by zero.",
    ),
    "misspelt hook": (
        f"{HOOK}\ndef refplug_register_provider(register): pass",
        "There is no hook 'refplug_register_provider'. Did you mean 'refplug_register_providers'?",
    ),
    "misspelt specname": (
        "from trl_refplug import hookimpl\n@hookimpl(specname='refplug_score')\ndef scored(): pass",
        "There is no hook 'refplug_score'. Did you mean 'refplug_scored'?",
    ),
    "unmarked hook": (
        f"{registering('x')}\ndef refplug_scored(seconds): pass",
        "refplug_scored() has no @hookimpl marker",
    ),
    "unmarked and misspelt": (
        "def refplug_register_provider(register): pass",
        "Did you mean 'refplug_register_providers'?",
    ),
    "wrong signature": (
        f"{HOOK}\ndef refplug_scored(log_prob, seconds): pass",
        "takes 'log_prob'; expected arguments from (identity, batch, log_probs, seconds). Did you mean 'log_probs'?",
    ),
    "variable arguments": (f"{HOOK}\ndef refplug_scored(**kwargs): pass", "takes '**kwargs'"),
    "wrapper": (
        "from trl_refplug import hookimpl\n@hookimpl(wrapper=True)\ndef refplug_scored():\n    return (yield)",
        "is a hook wrapper",
    ),
    "coroutine": (f"{HOOK}\nasync def refplug_scored(seconds): pass", "would never run"),
    "generator": (f"{HOOK}\ndef refplug_scored(seconds): yield", "would never run"),
    "no hooks": ("API_VERSION = 1", "It implements no hook; there are refplug_register_providers,"),
    "name in capitals": (registering("Uniform"), "Found provider name 'Uniform'; expected a lower-case letter"),
    "name is no string": (f"{HOOK}\ndef refplug_register_providers(register): register(None, 'a:B')", "name None"),
    "reserved name": (registering("auto"), "'auto' is reserved"),
    "taken name": (registering("frozen"), "'frozen' is taken by trl-refplug itself, and the built-in provider stays."),
    "name twice": (registering("uniform", "uniform"), "'uniform' is registered twice by this plugin."),
    "malformed target": (
        f"{HOOK}\ndef refplug_register_providers(register): register('x', 'package.Class')",
        "found target 'package.Class'; expected a class or 'package.module:Class'.",
    ),
    "target is no provider": (
        f"{HOOK}\ndef refplug_register_providers(register): register('x', dict)",
        "Provider 'x': found <class 'dict'>; expected a subclass of trl_refplug.ReferenceProvider.",
    ),
}


@pytest.mark.parametrize(("source", "told"), BROKEN.values(), ids=BROKEN)
def test_broken_plugin_stays_outside(site: FakeSite, source: str, told: str) -> None:
    site.install("acme-refs", "1.2", plugins={"acme": "acme_mod"}, modules={"acme_mod": source})
    site.install("sound-refs", plugins={"sound": "sound_mod"}, modules={"sound_mod": registering("uniform")})
    manager = PluginManager()
    record = record_of(manager, "acme")
    assert record.status == "failed"
    assert told in record.reason
    # What we find wrong ourselves is said in a sentence, without the name of an exception.
    assert "PluginError" not in record.reason
    assert record.exception is not None
    assert not any(provider.plugin.name == "acme" for provider in manager.providers.values())

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        manager.provider_class("uniform")
        manager.provider_class("frozen")
    (warning,) = (warning for warning in warned if warning.category is RefPlugWarning)
    for part in ("plugin 'acme' of acme-refs 1.2", "failed", told, "TRL_REFPLUG_BLOCK"):
        assert part in str(warning.message)

    # Selected, by the plugin's or the distribution's name, it is an error from the plugin's own
    for name in ("acme", "acme-refs", "acme_refs"):
        with pytest.raises(PluginError) as caught:
            PluginManager().provider_class(name)
        assert told in str(caught.value)
        assert caught.value.__cause__ is not None


def test_selected_broken_plugin_shows_its_own_traceback(site: FakeSite) -> None:
    source = f"{registering('uniform')}\n    1 / 0  # the culprit\n"
    site.install("acme-refs", plugins={"acme": "acme_mod"}, modules={"acme_mod": source})
    manager = PluginManager()
    assert record_of(manager, "acme").providers == ("uniform",)  # registered before it failed
    assert "uniform" not in manager.providers  # a plugin is used as a whole or not at all
    with pytest.raises(PluginError, match="ZeroDivisionError") as caught:
        manager.provider_class("uniform")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert "the culprit" in "".join(traceback.format_exception(caught.value))

    # Once another provider is in use, only the text of the traceback is kept. It is shown all the same.
    with pytest.warns(RefPlugWarning):
        manager.provider_class("frozen")
    with pytest.raises(PluginError) as caught:
        manager.provider_class("uniform")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert "the culprit" in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("value", ["acme_gone", "acme_gone.plugin:plugin", "acme_mod.sub", "acme_mod:absent"])
def test_stale_registration_is_one_line_without_traceback(site: FakeSite, value: str) -> None:
    """The module of the distribution, or the name in that module, does not exist any more."""
    site.install("acme-refs", "1.2", plugins={"acme": value}, modules={"acme_mod": registering("uniform")})
    manager = PluginManager()
    record = record_of(manager, "acme")
    assert record.reason.endswith(" The registration is stale: reinstall acme-refs, or uninstall it.")
    assert record.traceback == ""
    with pytest.raises(PluginError) as caught:
        manager.provider_class("acme")
    assert "\n" not in str(caught.value)
    assert "plugin 'acme' of acme-refs 1.2" in str(caught.value)
    assert "importlib" not in "".join(traceback.format_exception(caught.value))


def test_module_that_is_there_is_not_stale(site: FakeSite) -> None:
    """A syntax error is raised before any line of the plugin runs. The message says where it is."""
    site.install("acme-refs", plugins={"acme": "acme_mod"}, modules={"acme_mod": "def :"})
    record = record_of(PluginManager(), "acme")
    assert "(acme_mod.py, line 1). Upgrade or reinstall acme-refs" in record.reason
    assert record.traceback == ""


def test_stale_lazy_target_has_no_traceback(site: FakeSite) -> None:
    site.install("acme-refs", plugins={"acme": "acme_mod"}, modules={"acme_mod": LAZY})
    with pytest.raises(PluginError, match="The registration is stale: reinstall acme-refs") as caught:
        PluginManager().provider_class("uniform")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)
    assert caught.value.__cause__.__traceback__ is None


@pytest.mark.parametrize("source", ["import nowhere", "raise AttributeError", "{}['key']"])
def test_traceback_begins_in_the_plugins_own_code(site: FakeSite, source: str) -> None:
    modules = {"acme_mod": "import acme_inner", "acme_inner": f"def fail():\n    {source}\n\nfail()"}
    site.install("acme-refs", plugins={"acme": "acme_mod"}, modules=modules)
    record = record_of(PluginManager(), "acme")
    assert "stale" not in record.reason
    assert "report this to its authors" in record.reason
    _, first, *_ = record.traceback.splitlines()
    assert "acme_mod.py" in first
    assert "importlib" not in record.traceback
    assert source in record.traceback


@pytest.mark.parametrize("last", ["    raise ValueError from None", "    cause = error\nraise ValueError from cause"])
def test_broken_plugin_keeps_no_caller_alive(site: FakeSite, last: str) -> None:
    source = f"try:\n    import nowhere\nexcept ImportError as error:\n{last}"
    site.install("acme-refs", plugins={"acme": "acme_mod"}, modules={"acme_mod": source})

    class Policy:
        pass

    def train() -> tuple[PluginManager, weakref.ref[Policy]]:
        policy = Policy()
        manager = PluginManager()
        with pytest.warns(RefPlugWarning):
            manager.provider_class("frozen")
        return manager, weakref.ref(policy)

    manager, policy = train()
    gc.collect()
    assert record_of(manager, "acme").exception is not None
    assert policy() is None


def test_stale_plugin_keeps_no_caller_alive(site: FakeSite) -> None:
    """The exception that the plugin failed with has another one as its context, which has frames, too."""
    site.install("acme-refs", plugins={"acme": "acme_mod.sub"}, modules={"acme_mod": ""})
    error = record_of(PluginManager(), "acme").exception
    assert error is not None
    assert error.__context__ is not None
    assert error.__context__.__traceback__ is None


def test_all_hook_problems_are_told_at_once(site: FakeSite) -> None:
    source = f"{HOOK}\ndef refplug_scored(second): pass\ndef refplug_select_provider(context): pass"
    site.install("acme-refs", plugins={"acme": "acme_mod"}, modules={"acme_mod": source})
    reason = record_of(PluginManager(), "acme").reason
    assert "'second'" in reason
    assert "refplug_select_provider() has no @hookimpl marker" in reason


def test_entry_point_to_nothing_or_to_a_class(site: FakeSite) -> None:
    source = f"class Plugin:\n    {HOOK.splitlines()[0]}\n    @hookimpl\n    def refplug_scored(self): pass"
    plugins = {"absent": "acme_mod:absent", "class": "acme_mod:Plugin"}
    site.install("acme-refs", plugins=plugins, modules={"acme_mod": source})
    manager = PluginManager()
    assert "AttributeError" in record_of(manager, "absent").reason
    assert "names the class Plugin; expected a module or an instance" in record_of(manager, "class").reason


def test_one_module_under_two_names_is_loaded_once(site: FakeSite) -> None:
    plugins = {"acme": "acme_mod", "zebra": "acme_mod"}
    site.install("acme-refs", plugins=plugins, modules={"acme_mod": registering("uniform")})
    manager = PluginManager()
    assert record_of(manager, "acme").status == "ok"
    assert "loaded already, as acme-refs:acme" in record_of(manager, "zebra").reason


def test_one_name_twice_in_a_distribution_leaves_the_first_alone(site: FakeSite) -> None:
    metadata = site.install(
        "acme-refs", plugins={}, modules={"a_mod": selecting("return 'frozen'"), "b_mod": HOOK_ONLY}
    )
    (metadata / "entry_points.txt").write_text("[trl_refplug]\nacme = a_mod\nacme = b_mod\n")
    manager = PluginManager()
    assert sorted(record.status for record in manager.records) == ["failed", "ok", "ok"]
    assert manager.select(UNDECIDED) == "frozen"


def test_module_without_a_file(site: FakeSite) -> None:
    (site.path / "acme_namespace").mkdir()
    site.install("acme-refs", plugins={"acme": "acme_namespace"})
    record = record_of(PluginManager(), "acme")
    assert record.status == "failed"
    assert record.location == str(site.path)


@pytest.mark.parametrize(
    ("version", "remedy"),
    [("2", "upgrade trl-refplug"), ("0", "newer release of the plugin"), ("'1'", "integer"), ("True", "integer")],
)
def test_another_interface_is_incompatible_and_no_hook_runs(site: FakeSite, version: str, remedy: str) -> None:
    source = (
        f"API_VERSION = {version}\ncalled = []\n{HOOK}\ndef refplug_register_providers(register): called.append(1)"
    )
    site.install("acme-refs", plugins={"acme": "acme_mod"}, modules={"acme_mod": source})
    manager = PluginManager()
    record = record_of(manager, "acme")
    assert record.status == "incompatible"
    assert f"It speaks plugin interface {version}, this trl-refplug speaks 1: " in record.reason
    assert remedy in record.reason
    assert sys.modules["acme_mod"].called == []
    with pytest.raises(PluginError) as caught:
        manager.provider_class("acme")
    assert record.reason in str(caught.value)
    with pytest.warns(RefPlugWarning, match="incompatible"):
        manager.provider_class("frozen")


def test_unreadable_metadata_harms_nobody(site: FakeSite) -> None:
    site.install("sound-refs", plugins={"sound": "sound_mod"}, modules={"sound_mod": registering("uniform")})
    (site.install("torn-refs", plugins={}) / "entry_points.txt").write_text("[trl_refplug]\nno value\n")
    (site.install("nameless-refs", plugins={"nameless": "os"}) / "METADATA").unlink()
    (site.install("binary", plugins={}) / "entry_points.txt").write_bytes(b"\xff\xfe[trl_refplug]\xff")
    manager = PluginManager()
    assert "uniform" in manager.providers
    torn = [record for record in manager.records if record.status == "failed"]
    assert len(torn) == 2
    assert all("metadata cannot be read" in record.reason for record in torn)
    assert {part for record in torn for part in ("torn", "nameless") if part in record.reason} == {"torn", "nameless"}


# What the user leaves out


@pytest.mark.parametrize("setting", ["acme", "Acme", "acme-refs", "ACME.refs", " other , acme_refs,"])
def test_blocked_before_import(site: FakeSite, monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    site.install("acme-refs", "1.2", plugins={"acme": "acme_mod"}, modules={"acme_mod": registering("uniform")})
    site.install("other-refs", plugins={"other": "other_mod"}, modules={"other_mod": "raise RuntimeError"})
    monkeypatch.setenv("TRL_REFPLUG_BLOCK", setting)
    manager = PluginManager()
    record = record_of(manager, "acme")
    assert (record.status, record.reason) == ("blocked", f"Blocked by TRL_REFPLUG_BLOCK={setting}.")
    assert record.location == str(site.path)
    assert "acme_mod" not in sys.modules
    assert "uniform" not in manager.providers
    with pytest.raises(UnknownProviderError, match="TRL_REFPLUG_BLOCK"):
        manager.provider_class("acme")
    with pytest.raises(UnknownProviderError, match=r"Left out: .*plugin 'acme' of acme-refs 1\.2 \(blocked\)"):
        manager.provider_class("uniform")


def test_blocked_plugin_is_not_warned_about(site: FakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    site.install("acme-refs", plugins={"acme": "acme_mod"}, modules={"acme_mod": "raise RuntimeError"})
    monkeypatch.setenv("TRL_REFPLUG_BLOCK", "acme")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RefPlugWarning)
        PluginManager().provider_class("frozen")


def test_built_in_providers_cannot_be_blocked() -> None:
    for environ in ({"TRL_REFPLUG_BLOCK": "builtin,trl-refplug"}, {"TRL_REFPLUG_LOAD": "acme"}):
        assert PluginManager(environ).records[0].status == "ok"


@pytest.mark.parametrize(
    ("setting", "loaded"),
    [("sound", {"sound"}), ("sound-refs,acme", {"sound", "acme"}), ("", set()), ("acme", {"acme"})],
)
def test_allowlist(site: FakeSite, monkeypatch: pytest.MonkeyPatch, setting: str, loaded: set[str]) -> None:
    for name in ("acme", "sound"):
        site.install(f"{name}-refs", plugins={name: f"{name}_mod"}, modules={f"{name}_mod": registering(name)})
    monkeypatch.setenv("TRL_REFPLUG_LOAD", setting)
    manager = PluginManager()
    assert {name for name in ("acme", "sound") if record_of(manager, name).status == "ok"} == loaded
    assert {name for name in ("acme", "sound") if f"{name}_mod" in sys.modules} == loaded
    for name in {"acme", "sound"} - loaded:
        assert record_of(manager, name).reason == f"Not among TRL_REFPLUG_LOAD={setting}."


def test_blocking_wins_over_allowing(site: FakeSite) -> None:
    site.install("acme-refs", plugins={"acme": "acme_mod"}, modules={"acme_mod": registering("uniform")})
    manager = PluginManager({"TRL_REFPLUG_LOAD": "acme", "TRL_REFPLUG_BLOCK": "acme"})
    assert record_of(manager, "acme").status == "blocked"


@pytest.mark.parametrize("variable", ["TRL_REFPLUG_BLOCK", "TRL_REFPLUG_LOAD"])
def test_setting_that_names_nothing_is_warned_about(site: FakeSite, variable: str) -> None:
    site.install("acme-refs", plugins={"acme": "acme_mod"}, modules={"acme_mod": registering("uniform")})
    with pytest.warns(RefPlugWarning, match=f"{variable} names 'acme-ref'.*Did you mean 'acme-refs'?"):
        PluginManager({variable: "acme-ref"}).provider_class("frozen")


@given(st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,8}[A-Za-z0-9])?", fullmatch=True), st.sampled_from("-_."))
def test_names_are_compared_as_pep_503_says(name: str, separator: str) -> None:
    respelt = name.upper().replace("-", separator).replace("_", separator).replace(".", separator)
    record = PluginRecord("x", name, "1", "m", "/")
    assert record.answers_to({canonical(respelt)})
    assert not record.answers_to({canonical(respelt + "0")})


# Two plugins, one name


def test_contested_name_is_nobodys_whatever_the_order(site: FakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        modules = {f"{name}_mod": registering("uniform", f"only-{name}")}
        site.install(f"{name}-refs", "1.2", plugins={name: f"{name}_mod"}, modules=modules)
    site.install("c-refs", plugins={"c": "c_mod"}, modules={"c_mod": registering("third")})
    manager = PluginManager()
    assert [record_of(manager, name).status for name in "abc"] == ["failed", "failed", "ok"]
    assert {"uniform", "only-a", "only-b"}.isdisjoint(manager.providers)
    for asked in ("uniform", "only-a", "only-b"):
        with pytest.raises(PluginError) as caught:
            manager.provider_class(asked)
        for part in (
            "'uniform' is claimed by the plugin 'a' of a-refs 1.2 and the plugin 'b' of b-refs 1.2",
            "TRL_REFPLUG_BLOCK=a-refs or TRL_REFPLUG_BLOCK=b-refs",
        ):
            assert part in str(caught.value)

    monkeypatch.setenv("TRL_REFPLUG_BLOCK", "a-refs")  # as the message says
    assert PluginManager().provider_class("uniform") is sys.modules["b_mod"].Provider


def test_contest_keeps_what_is_blocked_already(site: FakeSite) -> None:
    plugins = {"a": "a_mod", "b": "b_mod"}
    modules = {"a_mod": registering("uniform"), "b_mod": registering("uniform")}
    site.install("acme-refs", plugins=plugins, modules=modules)
    reason = record_of(PluginManager({"TRL_REFPLUG_BLOCK": "c"}), "a").reason
    assert "TRL_REFPLUG_BLOCK=c,a or TRL_REFPLUG_BLOCK=c,b" in reason  # one distribution: its plugins' names


def test_contests_do_not_depend_on_who_failed_first(site: FakeSite) -> None:
    for name, claimed in (("a", ("x", "y")), ("b", ("x",)), ("c", ("y",))):
        site.install(f"{name}-refs", plugins={name: f"{name}_mod"}, modules={f"{name}_mod": registering(*claimed)})
    manager = PluginManager()
    assert {record_of(manager, name).status for name in "abc"} == {"failed"}
    assert "'x'" in record_of(manager, "a").reason
    assert "'y'" in record_of(manager, "a").reason


def test_failed_plugin_contests_nothing(site: FakeSite) -> None:
    source = f"{registering('uniform')}\n    1 / 0\n"
    site.install("a-refs", plugins={"a": "a_mod"}, modules={"a_mod": source})
    site.install("b-refs", plugins={"b": "b_mod"}, modules={"b_mod": registering("uniform")})
    with pytest.warns(RefPlugWarning, match="a-refs"):
        assert PluginManager().provider_class("uniform") is sys.modules["b_mod"].Provider


def test_two_distributions_may_name_their_plugin_alike(site: FakeSite) -> None:
    for name in ("a", "b"):
        site.install(f"{name}-refs", plugins={"default": f"{name}_mod"}, modules={f"{name}_mod": registering(name)})
    manager = PluginManager()
    assert [record.status for record in manager.records] == ["ok"] * 3
    assert manager.provider_class("a") is sys.modules["a_mod"].Provider
    assert manager.provider_class("b") is sys.modules["b_mod"].Provider


def test_distribution_found_twice_counts_once(make_site: Callable[[str], FakeSite]) -> None:
    for where, version in (("behind", "2.0"), ("first", "1.0")):
        modules = {"acme_mod": registering(where)}
        make_site(where).install("acme-refs", version, plugins={"acme": "acme_mod"}, modules=modules)
    manager = PluginManager()
    assert record_of(manager, "acme").version == "1.0"
    assert "first" in manager.providers
    assert "behind" not in manager.providers


def test_order_is_that_of_the_names_and_not_of_the_path(make_site: Callable[[str], FakeSite]) -> None:
    for name in ("a", "b", "c"):  # the last one comes first on the path
        make_site(name).install(f"{name}-refs", plugins={name: f"{name}_mod"}, modules={f"{name}_mod": HOOK_ONLY})
    assert [record.name for record in PluginManager().records] == ["builtin", "a", "b", "c"]


# Names that no plugin registers


def test_unknown_provider_lists_what_is_installed(site: FakeSite) -> None:
    site.install("acme-refs", "1.2", plugins={"acme": "acme_mod"}, modules={"acme_mod": "raise RuntimeError"})
    with pytest.raises(UnknownProviderError) as caught:
        PluginManager().provider_class("frozn")
    message = str(caught.value)
    for part in ("'frozn'", "Did you mean 'frozen'?", "frozen, adapter", "plugin 'acme' of acme-refs 1.2 (failed)"):
        assert part in message
    assert "`trl-refplug plugins`" in message
    assert "pip install" not in message


# Hooks that are called during training


def selecting(answer: str, marker: str = "hookimpl") -> str:
    header = "from trl_refplug import hookimpl\n"
    return (
        f"{header}seen = []\n@{marker}\ndef refplug_select_provider(context):\n    seen.append(context)\n    {answer}"
    )


def test_select_takes_the_first_answer(site: FakeSite) -> None:
    modules = {
        "a_mod": selecting("return 'frozen'", "hookimpl(trylast=True)"),
        "b_mod": selecting("return None", "hookimpl(tryfirst=True)"),
        "c_mod": selecting("return 'adapter'"),
    }
    site.install("acme-refs", plugins={name: name for name in modules}, modules=modules)
    context = UNDECIDED
    assert PluginManager().select(context) == "adapter"
    assert [sys.modules[name].seen for name in modules] == [[], [context], [context]]
    assert PluginManager({"TRL_REFPLUG_BLOCK": "c_mod"}).select(context) == "frozen"
    assert PluginManager({"TRL_REFPLUG_LOAD": "b_mod"}).select(replace(context, policy_is_peft=True)) == "adapter"


@pytest.mark.parametrize(
    ("decided", "expected"),
    [
        ({"args": SimpleNamespace(precompute_ref_log_probs=True)}, "cached"),
        ({"args": SimpleNamespace(sync_ref_model=True)}, "ema"),
        ({"has_ref_model": True, "policy_is_peft": True}, "frozen"),
    ],
)
def test_select_asks_nobody_where_trls_own_arguments_decide(site: FakeSite, decided: dict, expected: str) -> None:
    site.install("acme-refs", plugins={"a": "a_mod"}, modules={"a_mod": selecting("return 'remote'")})
    assert PluginManager().select(replace(UNDECIDED, **decided)) == expected
    assert PluginManager().select(UNDECIDED) == "remote"


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("raise OSError('no licence')", "OSError: no licence."),
        ("return 'nobody'", "found 'nobody'; expected None or one of frozen"),
        ("return 7", "found 7"),
        ("return []", "found []"),
    ],
)
def test_select_never_goes_on_to_another_reference(site: FakeSite, answer: str, told: str) -> None:
    modules = {"a_mod": selecting(answer, "hookimpl(tryfirst=True)"), "b_mod": selecting("return 'frozen'")}
    site.install("acme-refs", plugins={"a": "a_mod", "b": "b_mod"}, modules=modules)
    with pytest.raises(PluginError, match="TRL_REFPLUG_BLOCK") as caught:
        PluginManager().select(UNDECIDED)
    assert "'acme-refs:a'" in str(caught.value)
    assert told in str(caught.value)


IDENTITY = ReferenceIdentity("uniform", "00")


def test_observers_see_a_copy_of_every_answer(site: FakeSite) -> None:
    header = "from trl_refplug import hookimpl\nseen = []\n@hookimpl\n"
    modules = {
        "a_mod": f"{header}def refplug_scored(log_probs, seconds, identity):\n"
        "    seen.append((log_probs.clone(), seconds, identity))\n    log_probs.zero_()",
        "b_mod": f"{header}def refplug_scored(batch, log_probs, seconds=None, verbose=False):\n"
        "    seen.append((batch, log_probs.clone(), seconds))",
    }
    site.install("acme-refs", plugins={"a": "a_mod", "b": "b_mod"}, modules=modules)
    log_probs, batch = torch.tensor([[-1.0, -2.0]]), object()
    PluginManager().scored(IDENTITY, batch, log_probs, 0.5)
    assert log_probs.tolist() == [[-1.0, -2.0]]
    ((copy, seconds, identity),) = sys.modules["a_mod"].seen
    assert (copy.tolist(), seconds, identity) == ([[-1.0, -2.0]], 0.5, IDENTITY)
    ((seen_batch, copy, seconds),) = sys.modules["b_mod"].seen
    assert (seen_batch, copy.tolist(), seconds) == (batch, [[-1.0, -2.0]], 0.5)


def test_exception_of_an_observer_is_reported_once(site: FakeSite) -> None:
    modules = {
        "a_mod": "from trl_refplug import hookimpl\ncalls = []\n@hookimpl(tryfirst=True)\n"
        "def refplug_scored():\n    calls.append(1)\n    raise OSError('disk full')",
        "b_mod": "from trl_refplug import hookimpl\ncalls = []\n@hookimpl\ndef refplug_scored():\n    calls.append(1)",
    }
    site.install("acme-refs", plugins={"a": "a_mod", "b": "b_mod"}, modules=modules)
    manager = PluginManager()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(3):
            manager.scored(IDENTITY, object(), torch.zeros(1, 1), 0.0)
    (warning,) = (warning for warning in warned if warning.category is RefPlugWarning)
    for part in ("'acme-refs:a'", "refplug_scored", "OSError: disk full."):
        assert part in str(warning.message)
    assert [len(sys.modules[name].calls) for name in modules] == [3, 3]


def test_without_observers_nothing_is_touched() -> None:
    untouched = object()  # has no tensor methods
    PluginManager({"TRL_REFPLUG_LOAD": ""}).scored(IDENTITY, untouched, untouched, 0.0)


def test_hooks_of_a_plugin_that_is_out_are_not_called(site: FakeSite) -> None:
    observer = "\ncalls = []\n@hookimpl\ndef refplug_scored():\n    calls.append(1)\n"
    observer += "@hookimpl\ndef refplug_select_provider():\n    calls.append(1)"
    modules = {
        "contested_a": registering("uniform") + observer,
        "contested_b": registering("uniform") + observer,
        "raising": registering("other") + "    1 / 0\n" + observer,
    }
    site.install("acme-refs", plugins={name: name for name in modules}, modules=modules)
    manager = PluginManager()
    manager.scored(IDENTITY, object(), torch.zeros(1, 1), 0.0)
    assert manager.select(UNDECIDED) == "frozen"
    assert list(itertools.chain(*(sys.modules[name].calls for name in modules))) == []
