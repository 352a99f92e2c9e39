"""Before anything is imported: no test asks the hub, and none depends on the terminal it is run from."""

import os

import support.interpreter  # noqa: F401  before anything imports triton

os.environ["HF_HUB_OFFLINE"] = "1"
for name in ("COLUMNS", "FORCE_COLOR", "GITHUB_ACTIONS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(name, None)
