"""Prints the path of the plugin: `--external_plugins "$(python -m ...ms_swift)"`."""

from groundkern.integrations.ms_swift import PLUGIN

print(PLUGIN)
