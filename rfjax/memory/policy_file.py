"""Memory policies in a user's own file, written `FILE.py:CLASS`."""

import functools
import hashlib
import importlib.util
import re
import sys
import traceback
import types
from pathlib import Path
from typing import Any

from rfjax.errors import UserError, nearest

POLICY_FILE = re.compile(r".+?\.py:[A-Za-z_][A-Za-z0-9_]*")

_PREFIX = "rfjax_policy_file_"
_CODE = "RFJAX_CODE"


def load_policy_file(text: str) -> type:
    """Return the class that `FILE.py:CLASS` names: the same one until the file changes.

    Raises:
        UserError: there is no such file or class in it, or the file does not run.
    """
    path, _, name = text.rpartition(":")
    module = _load(Path(path).resolve())
    policy = vars(module).get(name)
    if isinstance(policy, type):
        return policy
    classes = classes_of(path)
    raise UserError(f"{path} has no class {name!r}; it has: {', '.join(classes) or 'none'}{nearest(name, classes)}")


def classes_of(path: str) -> list[str]:
    """Return the names of the classes that a policy file defines, or raise `UserError`."""
    module = _load(Path(path).resolve())
    return [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]


def policy_source(policy: Any) -> dict[str, str]:
    """Return the `file` that a policy's class came from and the hash of its `code`; nothing for built-in policies."""
    module = sys.modules.get(type(policy).__module__)
    if module is None or not module.__name__.startswith(_PREFIX):
        return {}
    return {"file": Path(str(module.__file__)).name, "code": vars(module)[_CODE]}


def is_from_file(policy: type) -> bool:
    """Whether a class was defined in a policy file."""
    return policy.__module__.startswith(_PREFIX)


def _load(path: Path) -> types.ModuleType:
    try:
        code = path.read_bytes()
    except OSError as error:
        raise UserError(f"there is no policy file {path}: {error.strerror}") from None
    return _run(path, code)


@functools.cache
def _run(path: Path, code: bytes) -> types.ModuleType:
    """Run a file once: another class object of the same name would be another policy to JAX, and compile again."""
    name = f"{_PREFIX}{path.stem}_{hashlib.sha256(str(path).encode() + code).hexdigest()[:16]}"
    spec = importlib.util.spec_from_loader(name, loader=None, origin=str(path))
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = str(path)
    vars(module)[_CODE] = f"sha256:{hashlib.sha256(code).hexdigest()[:16]}"
    sys.modules[name] = module  # dataclasses look their module up
    try:
        exec(compile(code, path, "exec"), vars(module))
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} does not run: {where(error, path)}{type(error).__name__}: {error}") from error
    return module


def where(error: BaseException, path: Path) -> str:
    """Say in which line of a file an error arose, or nothing where it was not there."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: "
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
    return f"line {lines[-1]}: " if lines else ""
