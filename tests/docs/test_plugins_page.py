"""The hook reference says what hookspecs.py says, and its examples are plugins."""

import inspect
import re

import pytest

from tests.conftest import FakeSite
from tests.docs.markdown import DOCS, blocks
from trl_refplug import hookspecs
from trl_refplug.plugins import PluginManager


HOOKS = {name: value for name, value in vars(hookspecs).items() if hasattr(value, f"{hookspecs.PROJECT}_spec")}
PAGE = (DOCS / "plugins.md").read_text()
EXAMPLES = [block.code for block in blocks("plugins.md") if "@hookimpl" in block.code]


def test_every_hook_is_documented_with_its_signature():
    signatures = [f"{name}({', '.join(inspect.signature(hook).parameters)})" for name, hook in HOOKS.items()]
    assert len(signatures) == 3
    assert re.findall(r"^### `(refplug_.*)`$", PAGE, re.M) == signatures


def test_what_selection_may_look_at_is_documented():
    section = PAGE.partition("### `refplug_select_provider")[2].partition("\n###")[0]
    facts = {name for name, value in vars(hookspecs.SelectionContext).items() if isinstance(value, property)}
    assert facts
    assert all(f"`{fact}`" in section for fact in facts)


@pytest.mark.parametrize("source", EXAMPLES)
def test_every_example_is_a_sound_plugin(source, site: FakeSite):
    site.install("acme-refs", plugins={"acme": "acme_mod"}, modules={"acme_mod": source})
    record = next(record for record in PluginManager().records if record.name == "acme")
    assert (record.status, record.reason) == ("ok", "")


def test_every_hook_has_an_example():
    assert [re.findall(r"def (refplug_\w+)", source) for source in EXAMPLES] == [[name] for name in HOOKS]
