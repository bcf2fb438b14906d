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
    """Returns the command that installs an extra: from the folder of an editable installation, else by name."""
    try:
        origin = json.loads(distribution("editlib").read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        origin = {}
    if "dir_info" not in origin:
        return f"pip install 'editlib[{extra}]'"
    edit = "-e " if origin["dir_info"].get("editable") else ""
    return f"in the folder of editlib: pip install {edit}'.[{extra}]'"
