"""Which versions of other libraries this one is tested with, told in one sentence where another is installed."""

from __future__ import annotations

import importlib.metadata

from .errors import UserError

TESTED = {"peft": ("0.19", "0.21"), "transformers": ("5.17", "5.23")}  # first and last minor version
OPEN_ENDED = {"transformers"}  # newer ones are let through: its models are reached by its public interface alone


def require_tested(package: str, for_what: str) -> None:
    """Raises UserError if the package is not installed, or in a version that our tests do not cover."""
    first, last = TESTED[package]
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"{for_what} needs {package}, which is not installed: pip install '{package}>={first}'."
        ) from None
    too_new = _minor(version) > _minor(last) and package not in OPEN_ENDED
    if _minor(version) < _minor(first) or too_new:
        raise UserError(
            f"{for_what} is tested with {package} {first} to {last}, but {version} is installed: "
            f"pip install '{package}=={last}.*'."
        )


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])
