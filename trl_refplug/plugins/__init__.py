"""
The plugin system. The hooks themselves are defined in `trl_refplug.hookspecs`.

- `installed`: lists the plugins that are installed, before any of them is imported
- `checks`: finds out what is wrong with a plugin or a provider, and says so in sentences
- `failures`: turns an exception that a plugin raised into a message that says what to do
- `loading`: imports the plugins, takes in the sound ones and leaves the others out
- `manager`: resolves a provider name to its class, and calls the hooks
- `flags`: checks what the reference flags say, without importing TRL
"""

from trl_refplug.plugins.flags import check_reference_flags
from trl_refplug.plugins.installed import PluginRecord
from trl_refplug.plugins.loading import RegisteredProvider
from trl_refplug.plugins.manager import PluginManager, plugin_manager


__all__ = ["PluginManager", "PluginRecord", "RegisteredProvider", "check_reference_flags", "plugin_manager"]
