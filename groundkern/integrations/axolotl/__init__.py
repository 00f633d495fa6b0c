"""axolotl: a plugin that attaches the objectives, and makes batches of the samples' own regions.

    plugins:
      - groundkern.integrations.axolotl.GroundkernPlugin
    groundkern:
      objectives:
        klal: {weight: 0.5}

`settings` is the section of the YAML, `conflicts` what of axolotl cannot go with it, `rows` makes
examples of a data set's rows, `collator` batches of them, `plugin` is what axolotl calls.
"""

from groundkern.integrations.axolotl.plugin import GroundkernPlugin
from groundkern.integrations.axolotl.settings import GroundkernArgs

__all__ = ["GroundkernArgs", "GroundkernPlugin"]
