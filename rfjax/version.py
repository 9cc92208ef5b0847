"""The installed version."""

from importlib.metadata import PackageNotFoundError, version


def rfjax_version() -> str:
    """Return the installed version of rfjax."""
    try:
        return version("rfjax")
    except PackageNotFoundError:
        return "unknown (not installed)"
