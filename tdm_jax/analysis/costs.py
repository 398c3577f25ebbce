"""What a model costs, without running it: multiply-adds, parameters, tokens, activation bytes.

Multiply-adds are torchprofile's, the papers' "FLOPs", and its rules go on where its authors' models
ended. Of one image it counts linear maps and products, and one for each output of an elementwise
product, a norm or a mean; nothing for softmax, activations, sums, divisions, distances, sorts and
gathers. In particular:

- The attention's scale is a product with each logit, the pooling head's with its query, as the
  programs have it. A gate, a layer scale, and the norms inside an MLP, before the blocks or behind
  the pooling count one a channel; so does a norm on one vector.
- Rotary positions turn every channel of the queries and keys of all tokens by two products, the
  prefix too. Where tokens have moved, each has two means for its place, and an angle for each pair
  of a head's channels; before that, angles are constants.
- The mean over patches that a head reads weighs every token by what it stands for: a product.
- The pooling head's own query is made once an image.
- All tokens go through the last block, as in every original; our programs leave out there what a
  head that reads the class token alone does not need (`executed`).
- What follows the source map (sizes, places) are sums and gathers, even where a program writes
  them as products with ones and zeros, which the convention "matmul" does count.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from jax.interpreters.partial_eval import dce_jaxpr
from jaxtyping import Array, PyTree

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
      convention: "torchprofile" is what the papers print, see this module's head. "matmul" is all
        products and convolutions of the traced program of all tokens, and nothing else.
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
    n = shape.patches
    total = n * model.patch_size**2 * model.in_channels * d
    total += (n + shape.prefix) * d if model.pre_norm else 0
    for layer, block in enumerate(model.schedule):
        total += _attention(model, block.attention)
        total += (block.mlp + shape.prefix) * _mlp(model)
        total += model.reducer.macs(layer, n, shape)
        n = block.out
    return total + _head(model, n)


def _attention(model: VisionTransformer, n: int) -> int:
    """Of a block whose attention sees n patch tokens."""
    shape, d = model.shape, model.width
    t = n + shape.prefix
    # The norm, four linear maps, two products and the scale between them.
    total = t * d + 4 * t * d * d + 2 * t * t * d + shape.num_heads * t * t
    total += t * d if model.layer_scale else 0
    if model.rotary is not None:
        moved = n < shape.patches
        total += 4 * t * d + (n * (2 + d // shape.num_heads // 2) if moved else 0)
    return total


def _mlp(model: VisionTransformer) -> int:
    """Of a token in a block."""
    d, hidden = model.width, model.mlp_hidden
    # The norm, two linear maps, of which a gated first makes twice as much, and the gate.
    total = d + 2 * d * hidden + ((d * hidden + hidden) if model.gated_mlp else 0)
    return total + (hidden if model.mlp_norm else 0) + (d if model.layer_scale else 0)


def _head(model: VisionTransformer, n: int) -> int:
    """Behind the last block, of n patch tokens."""
    d, t, pooled = model.width, n + model.shape.prefix, model.width
    # Of the tokens, or of the pooled vector.
    total = d if model.fc_norm else t * d
    if model.pooling.endswith("avg"):
        total += n * d
    if model.pooling == "token_avg":
        pooled = 2 * d
    if model.pooling == "map":
        # The query and its scale; keys, values and their products; projection, norm and MLP.
        total += d * d + d + 2 * t * d * d + 2 * t * d + d * d + d + 2 * d * model.mlp_hidden
    return total + (2 if model.distilled else 1) * pooled * model.num_classes


def executed(model: VisionTransformer) -> int:
    """Multiply-adds of the products of the program that answers for one image, as it is traced.

    Those of `count` by "matmul", less what the last block leaves out (`VisionTransformer.read`).
    """
    return _traced(model, model.apply)


def _matmul(model: VisionTransformer) -> int:
    def answer(variables: PyTree, images: Array) -> Any:
        # With `Info`, the last block leaves nothing out.
        return model.apply(variables, images, return_info=True)[0]

    return _traced(model, answer)


def _traced(model: VisionTransformer, function: Callable[..., Any]) -> int:
    traced = jax.make_jaxpr(function)(_variables(model), _images(model, 1)).jaxpr
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
