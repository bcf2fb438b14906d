"""Tell the installed version of editlib."""

from importlib.metadata import PackageNotFoundError, version


def library_version() -> str:
    """Gives the installed version of editlib; "unknown" for a source tree that is only on the path."""
    try:
        return version("editlib")
    except PackageNotFoundError:
        return "unknown"
