"""
The plugin system: `installed` finds what claims to be a plugin, `checks` tells what is wrong with one, `manager` loads
the sound ones, keeps the others outside and resolves a provider name to its class. The hooks are in
`trl_refplug.hookspecs`.
"""

from trl_refplug.plugins.installed import PluginRecord
from trl_refplug.plugins.manager import PluginManager, RegisteredProvider, plugin_manager


__all__ = ["PluginManager", "PluginRecord", "RegisteredProvider", "plugin_manager"]
