"""Memory policies in a user's own file, written `FILE.py:CLASS`."""

import functools
import importlib.util
import re
import sys
import traceback
from pathlib import Path

from rfjax.errors import UserError, nearest

POLICY_FILE = re.compile(r".+?\.py:[A-Za-z_][A-Za-z0-9_]*")


def load_policy_file(text: str) -> type:
    """Return the class that `FILE.py:CLASS` names.

    Raises:
        UserError: there is no such file or class in it, or the file does not run.
    """
    path, _, name = text.rpartition(":")
    module = _run(Path(path).resolve())
    policy = vars(module).get(name)
    if isinstance(policy, type):
        return policy
    classes = [
        key for key, value in vars(module).items() if isinstance(value, type) and value.__module__ == module.__name__
    ]
    raise UserError(f"{path} has no class {name!r}; it has: {', '.join(classes) or 'none'}{nearest(name, classes)}")


@functools.cache
def _run(path: Path):
    """Run a file once: another class object of the same name would be another policy to JAX, and compile again."""
    name = f"rfjax_policy_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UserError(f"there is no policy file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UserError(f"{path} does not run: {where(error, path)}{type(error).__name__}: {error}") from error
    return module


def where(error: BaseException, path: Path) -> str:
    """Say in which line of a file an error arose, or nothing where it was not there."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: "
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
    return f"line {lines[-1]}: " if lines else ""
