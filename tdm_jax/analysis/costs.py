"""What a model costs, without running it: multiply-adds, parameters, tokens, activation bytes."""

import dataclasses
import math
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from jax.interpreters.partial_eval import dce_jaxpr
from jaxtyping import PyTree

from tdm_jax.errors import unknown
from tdm_jax.models.registry import create_model
from tdm_jax.models.vit import VisionTransformer, parameter_count
from tdm_jax.reduction import Reducer

CONVENTIONS = ("torchprofile", "matmul")


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one image.

    Attributes:
      macs: multiply-adds ("FLOPs" in the papers' tables).
      parameters: scalars that are trained, a method's own included.
      tokens: patch tokens that leave each block.
    """

    macs: int
    parameters: int
    tokens: tuple[int, ...]

    @property
    def gflops(self) -> float:
        """Multiply-adds in units of 1e9, as the papers print them."""
        return self.macs / 1e9


def count(
    model: VisionTransformer | str,
    reducer: str | Reducer | None = None,
    keep_rate: float | tuple[float, ...] | None = None,
    convention: str = "torchprofile",
    **settings: Any,
) -> Cost:
    """Counts a model's cost for one image.

    Args:
      model: a model, or a name for `create_model`; the other arguments change it.
      reducer: see `create_model`; None for the model's own, or none.
      keep_rate: see `create_model`; None for the reducer's own.
      convention: "torchprofile" is what the papers print: linear maps and products, one for each
        output of an elementwise product, a norm or a mean, nothing for softmax, GELU, sums,
        distances, sorts and gathers. "matmul" is all products and convolutions of the traced
        program and nothing else.
      **settings: see `create_model`.

    Raises:
      InputError: the convention, or anything `create_model` refuses.
    """
    if convention not in CONVENTIONS:
        raise unknown("cost convention", convention, CONVENTIONS)
    if isinstance(model, str):
        model = create_model(model, "none" if reducer is None else reducer, keep_rate, **settings)
    elif settings or keep_rate is not None or reducer is not None:
        model = _changed(model, reducer, keep_rate, settings)
    macs = multiply_adds(model) if convention == "torchprofile" else _matmul(model)
    return Cost(macs, parameters(model), tuple(block.out for block in model.schedule))


def _changed(
    model: VisionTransformer,
    reducer: str | Reducer | None,
    keep_rate: float | tuple[float, ...] | None,
    settings: dict[str, Any],
) -> VisionTransformer:
    fields = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(model)
        if field.name not in ("parent", "name", "reducer")
    }
    if reducer is None:
        own = model.reducer
        reducer, keep_rate = own if keep_rate is None else own.at_keep_rate(keep_rate), None
    return create_model("vit", reducer, keep_rate, **{**fields, **settings})


def parameters(model: VisionTransformer) -> int:
    """Exact number of parameters."""
    return parameter_count(_variables(model))


def activation_bytes(model: VisionTransformer) -> int:
    """Bytes per image that a training step keeps from the forward for the backward pass.

    Traced, not measured: what the compiler fuses away or recomputes is still counted.
    """
    key = jax.random.key(0)

    def residuals(batch: int) -> int:
        def forward(variables: PyTree) -> Any:
            rngs = {"dropout": key, "reducer": key}
            images = jnp.zeros(_images(model, batch).shape, model.dtype)
            return model.apply(variables, images, train=True, rngs=rngs)

        _, backward = jax.eval_shape(lambda v: jax.vjp(forward, v), _variables(model))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))

    # Weights are residuals too; only what grows with the batch is an activation.
    return residuals(3) - residuals(2)


def _images(model: VisionTransformer, batch: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch, *model.image_size, model.in_channels), jnp.float32)


def _variables(model: VisionTransformer) -> PyTree:
    return jax.eval_shape(model.init, jax.random.key(0), _images(model, 1))


def multiply_adds(model: VisionTransformer) -> int:
    """`count`'s multiply-adds by torchprofile's convention, in no time: nothing is traced."""
    shape, d = model.shape, model.width
    total = shape.patches * model.patch_size**2 * model.in_channels * d
    n = shape.patches
    for layer, block in enumerate(model.schedule):
        t, m = block.attention + shape.prefix, block.mlp + shape.prefix
        total += 4 * t * d * d + 2 * t * t * d + shape.num_heads * t * t + t * d
        total += 2 * m * d * model.mlp_hidden + m * d
        total += model.reducer.macs(layer, n, shape)
        n = block.out
    heads = 2 if model.distilled else 1
    return total + (n + shape.prefix) * d + heads * d * model.num_classes


def _matmul(model: VisionTransformer) -> int:
    traced = jax.make_jaxpr(model.apply)(_variables(model), _images(model, 1)).jaxpr
    # The source map and the sizes are traced too; what no output needs is never run.
    return products(dce_jaxpr(traced, [True] * len(traced.outvars))[0])


def products(jaxpr: Any) -> int:
    """Multiply-adds of all products and convolutions in a jaxpr, nested calls included."""
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            (contract, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval, equation.outvars[0].aval
            total += math.prod(left.shape[axis] for axis in contract) * math.prod(out.shape)
        elif name == "conv_general_dilated":
            features = equation.params["dimension_numbers"].rhs_spec[0]
            kernel, out = equation.invars[1].aval, equation.outvars[0].aval
            total += math.prod(kernel.shape) // kernel.shape[features] * math.prod(out.shape)
        inside = list(equation.params.values())
        if name == "cond":
            # Of the forms that platforms choose between, the last is everybody else's.
            inside = [equation.params["branches"][-1]]
        for inner in jax.tree.leaves(inside, is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                total += equation.params.get("length", 1) * products(getattr(inner, "jaxpr", inner))
    return total


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, (jax.extend.core.Jaxpr, jax.extend.core.ClosedJaxpr))
