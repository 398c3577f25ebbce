"""Which form of an operation a program gets: its platform's, or the one that was pinned."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax

from tdm_jax.errors import unknown

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
REFERENCE = "reference"

_pinned: contextvars.ContextVar[str | None] = contextvars.ContextVar("pinned", default=None)


@contextlib.contextmanager
def pinned(platform: str) -> Iterator[None]:
    """Traces every operation in one platform's form, so that a program holds no other.

    A program usually holds the forms of all platforms and picks one when it is lowered. Exporters
    to other formats cannot do that, and a program for one platform need not. What was traced before
    stays as it is: a function that was jitted outside keeps its forms.

    Args:
      platform: one of `PLATFORMS`, or "reference" for the plain form of every operation.

    Raises:
      InputError: there is no such platform.
    """
    if platform not in (*PLATFORMS, REFERENCE):
        raise unknown("platform", platform, (*PLATFORMS, REFERENCE))
    token = _pinned.set(platform)
    try:
        yield
    finally:
        _pinned.reset(token)


def by_platform(*args: Any, reference: Callable[..., Any], **forms: Callable[..., Any]) -> Any:
    """Calls the form of an operation that belongs to the platform it will run on.

    Args:
      *args: of the operation; every form takes the same, and answers alike.
      reference: the plain form, everybody else's.
      **forms: by platform.
    """
    platform = _pinned.get()
    if platform is None:
        return jax.lax.platform_dependent(*args, default=reference, **forms)
    return forms.get(platform, reference)(*args)
