"""Which form of an operation a program gets: its platform's, or the one that was pinned."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from tdm_jax.errors import unknown

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
REFERENCE = "reference"

# What jax.jit has compiled under one value is traced anew under another.
_pinned = jax.make_user_context(None)
_reverse_mode = jax.make_user_context(False)
_portable = jax.make_user_context(False)
_mesh = jax.make_user_context(None)


def pinned(platform: str) -> contextlib.AbstractContextManager:
    """Traces every operation in one platform's form, so that a program holds no other.

    A program usually holds the forms of all platforms and picks one when it is lowered. Exporters
    to other formats cannot do that, and a program for one platform need not. It acts while a
    program is traced: a jitted function is traced anew under it, but what `jax.make_jaxpr`,
    `jax.jit(...).lower` or `jax.export` made before stays as it is. Where a form needs its device
    at hand to be traced at all (cuDNN's attention), the reference stands in for it elsewhere.

    Args:
      platform: one of `PLATFORMS`, or "reference" for the plain form of every operation.

    Raises:
      InputError: there is no such platform.
    """
    if platform not in (*PLATFORMS, REFERENCE):
        raise unknown("platform", platform, (*PLATFORMS, REFERENCE))
    return _pinned(platform)


def by_platform(*args: Any, reference: Callable[..., Any], **forms: Callable[..., Any]) -> Any:
    """Calls the form of an operation that belongs to the platform it will run on.

    Args:
      *args: of the operation; every form takes the same, and answers alike.
      reference: the plain form, everybody else's.
      **forms: by platform.
    """
    platform = _pinned.value
    if platform is None:
        return jax.lax.platform_dependent(*args, default=reference, **forms)
    return forms.get(platform, reference)(*args)


def split_over(mesh: Mesh) -> contextlib.AbstractContextManager:
    """Traces programs whose batch is split over all axes of a mesh.

    It concerns TPUs' attention (see `tdm_jax.ops.attention`), which has to be told, and CPUs' loop
    over parts of a batch (see `tdm_jax.models.vit`), which only a single device has.
    """
    return _mesh(mesh)


def batch_mesh() -> Mesh | None:
    """What the batch of the program that is being traced is split over, if it has been told."""
    return _mesh.value


def may_hold_tpu_kernels() -> bool:
    """Whether the program that is being traced is for TPUs alone: pinned to them, or on one.

    On several it has to be told how they share the batch, see `split_over`.
    """
    return _is_for("tpu", _mesh.value is not None or jax.device_count() == 1)


def is_for_one_cpu() -> bool:
    """Whether the program that is being traced is for a single CPU: pinned to it, or on it."""
    mesh = _mesh.value
    return _is_for("cpu", (jax.device_count() if mesh is None else mesh.size) == 1)


def _is_for(platform: str, known: bool) -> bool:
    if _portable.value:
        return False
    if _pinned.value is not None:
        return _pinned.value == platform
    return known and jax.default_backend() == platform


def reverse_mode() -> contextlib.AbstractContextManager:
    """Traces operations in forms that `jax.grad` alone can differentiate, where those save memory.

    Without it `jax.jvp` and `jax.linearize` work everywhere. A training step, which needs neither,
    is traced under it. It concerns the kernels of `tdm_jax.ops.attention`.
    """
    return _reverse_mode(True)


def in_reverse_mode() -> bool:
    """Whether the program that is being traced may allow reverse mode alone."""
    return _reverse_mode.value


def portable() -> contextlib.AbstractContextManager:
    """Traces no kernel that only the device at hand has, so that a program runs on others too.

    It concerns cuDNN's attention and TPUs' (see `tdm_jax.ops.attention`), and a CPU's loop.
    """
    return _portable(True)


def is_portable() -> bool:
    """Whether the program that is being traced is for other devices, too."""
    return _portable.value
