"""
The plugin system: `installed` finds what claims to be a plugin, `checks` tells what is wrong with one, `loading` takes
in the sound ones and keeps the others outside, `manager` resolves a provider name to its class and calls the hooks,
`flags` checks what the reference flags say. The hooks are in `trl_refplug.hookspecs`.
"""

from trl_refplug.plugins.flags import check_reference_flags
from trl_refplug.plugins.installed import PluginRecord
from trl_refplug.plugins.loading import RegisteredProvider
from trl_refplug.plugins.manager import PluginManager, plugin_manager


__all__ = ["PluginManager", "PluginRecord", "RegisteredProvider", "check_reference_flags", "plugin_manager"]
