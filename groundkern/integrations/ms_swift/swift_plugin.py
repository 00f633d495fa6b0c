"""What `--external_plugins` is given: the settings are in the file that the environment names."""

import os

from groundkern.integrations.ms_swift import VARIABLE, register

if not os.environ.get(VARIABLE):
    raise ValueError(f"{VARIABLE}: expected the path of a YAML or JSON file, got none")
register(os.environ[VARIABLE])
