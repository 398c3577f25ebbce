"""A traced program once more, in the few operations that converters to other formats know.

Nested programs (`jit`, `checkpoint`, custom derivatives) are opened, padding and stacking become
concatenations, and nothing is done to arrays that hold nothing: other runtimes refuse some of it.
The numbers are the same.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jaxtyping import Array

from tdm_jax.errors import InputError

# Where a nested program stands among its operation's settings.
_NESTED = ("jaxpr", "call_jaxpr")
_OPENED = {"jit", "pjit", "closed_call", "remat2", "checkpoint", "custom_jvp_call"}
_COPIES = {"copy", "copy_p", "stop_gradient"}
# Of no numbers these are 0 (or false).
_SUMS = {"dot_general", "reduce_sum", "reduce_or"}


def run(program: core.ClosedJaxpr, *arguments: Array) -> list[Array]:
    """The program's results, by plain operations; to be traced.

    Raises:
      InputError: the program draws random numbers, or reduces none in a way that has no answer.
    """
    return _run(program.jaxpr, program.consts, arguments)


def _run(jaxpr: Any, constants: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """As `run`; an array that holds nothing is None on the way."""
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *arguments), strict=True))

    def value(variable: Any) -> Any:
        return variable.val if isinstance(variable, core.Literal) else known[variable]

    for equation in jaxpr.eqns:
        results = _one(equation, [value(variable) for variable in equation.invars])
        known.update(zip(equation.outvars, results, strict=True))
    return [value(variable) for variable in jaxpr.outvars]


def _one(equation: Any, values: list[Any]) -> Sequence[Any]:
    """The results of one operation."""
    name, settings = equation.primitive.name, equation.params
    if name in _OPENED:
        nested = next(settings[key] for key in _NESTED if key in settings)
        return _run(getattr(nested, "jaxpr", nested), getattr(nested, "consts", ()), values)
    if name.startswith("random_"):
        raise InputError("the method draws random numbers by jax.random, which no converter knows")
    if name in _COPIES:
        return values
    shapes = [variable.aval.shape for variable in equation.outvars]
    if all(0 in shape for shape in shapes):
        return [None] * len(shapes)
    if name == "concatenate":
        parts = [value for value in values if value is not None]
        return [lax.concatenate(parts, settings["dimension"])]
    if any(value is None for value in values):
        if name not in _SUMS:
            raise InputError(f"no converter takes {name} of an array that holds nothing")
        return [jnp.zeros(shapes[0], equation.outvars[0].aval.dtype)]
    if name == "pad":
        x, filling = values
        return [_pad(x, filling, settings["padding_config"])]
    if name == "stack":
        rows = [lax.expand_dims(value, [settings["axis"]]) for value in values]
        return [lax.concatenate(rows, settings["axis"])]
    if name == "dot_general" and _is_linear(settings["dimension_numbers"], *values):
        # One operator elsewhere, too, and a fast one, where the general form is an einsum.
        return [jnp.matmul(*values)]
    results = equation.primitive.bind(*values, **settings)
    return results if equation.primitive.multiple_results else [results]


def _is_linear(numbers: Any, x: Any, kernel: Any) -> bool:
    """Whether a product is that of vectors with one matrix."""
    return kernel.ndim == 2 and numbers == (((x.ndim - 1,), (0,)), ((), ()))


def _pad(x: Any, filling: Any, config: Any) -> Array:
    for axis, (low, high, between) in enumerate(config):
        if between:
            raise InputError("no converter takes padding between an array's elements")
        x = lax.slice_in_dim(x, max(-low, 0), x.shape[axis] - max(-high, 0), axis=axis)
        sides = (
            jnp.broadcast_to(filling, (*x.shape[:axis], n, *x.shape[axis + 1 :]))
            for n in (max(low, 0), max(high, 0))
        )
        parts = [part for part in (next(sides), x, next(sides)) if part.shape[axis] != 0]
        x = lax.concatenate(parts, axis)
    return x
