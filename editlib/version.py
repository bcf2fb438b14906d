"""Find the installed version of editlib, and how to install its extras."""

import json
from importlib.metadata import PackageNotFoundError, distribution, version


def library_version() -> str:
    """Returns the installed version of editlib; "unknown" for a source tree that is only on the path."""
    try:
        return version("editlib")
    except PackageNotFoundError:
        return "unknown"


def install_line(extra: str) -> str:
    """Returns the command that installs an extra: in the folder of an installation or of a source tree, and by name for
    a wheel."""
    try:
        origin = json.loads(distribution("editlib").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:  # a source tree on the path
        origin = {"dir_info": {}}
    except ValueError:
        origin = {}
    if "dir_info" not in origin:
        return f"pip install 'editlib[{extra}]'"
    edit = "-e " if origin["dir_info"].get("editable") else ""
    return f"pip install {edit}'.[{extra}]' in the folder of editlib"
