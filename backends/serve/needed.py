"""What serving needs beside the package. Imports nothing heavy."""

from __future__ import annotations

from importlib.util import find_spec

from sparsify.errors import SpecError

# Those of the extra ``serve`` that transformers' handlers and the server import.
_PACKAGES = ("fastapi", "uvicorn", "openai")


def require_server() -> None:
    """Raises:
    SpecError: a package of the extra ``serve`` is not installed.
    """
    missing = [package for package in _PACKAGES if find_spec(package) is None]
    if missing:
        found = f"{' and '.join(missing)} not installed"
        raise SpecError("serve", found=found, do="pip install 'sparsify-fx[serve]'")
