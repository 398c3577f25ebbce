"""Costs against the integers in the authors' logs, and against the lowered program."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tdm_jax import create_model, make_reducer
from tdm_jax.analysis import costs
from tdm_jax.errors import InputError
from tdm_jax.models.rotary import Rotary
from tdm_jax.reduction.sliced import Sliced

SMALL = "deit_small_patch16_224"
TINY = {
    "image_size": 32,
    "patch_size": 8,
    "width": 24,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 5,
    "layers": (1, 2),
}


@pytest.mark.parametrize(
    ("keep_rate", "macs", "tokens"),
    [
        (0.7, 3_004_791_637, (138, 97, 69)),
        (0.6, 2_583_245_078, (116, 69, 42)),
        (0.5, 2_344_407_958, (102, 53, 28)),
        (0.4, 2_083_041_474, (82, 36, 17)),
        (0.3, 1_823_257_894, (59, 20, 8)),
        (0.2, 1_645_052_990, (40, 10, 4)),
    ],
)
def test_published_tdm_costs_what_the_authors_logged(keep_rate, macs, tokens):
    reducer = make_reducer("tdm", preset="published", keep_rate=keep_rate)
    got = costs.count(SMALL, reducer)
    assert got.macs == macs
    assert got.tokens[3::3] == tokens


def test_unreduced_and_evit_cost_what_torchprofile_counts():
    assert costs.count(SMALL).macs == 4_603_567_752
    assert costs.count(SMALL, "evit", 0.7).macs == 3_032_105_162


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("deit_tiny_patch16_224", 5_717_416),
        ("deit_small_patch16_224", 22_050_664),
        ("deit_base_patch16_224", 86_567_656),
    ],
)
def test_parameters_are_deits(name, parameters):
    assert costs.count(name).parameters == parameters
    assert costs.count(name, "tdm", 0.5).parameters == parameters


@pytest.mark.parametrize(("size", "gflops"), [("tiny", 0.8), ("small", 3.0), ("base", 11.5)])
def test_tdm_lands_on_the_papers_table(size, gflops):
    assert round(costs.count(f"deit_{size}_patch16_224", "tdm", 0.7).gflops, 1) == gflops


def test_matmul_convention_has_a_closed_form_without_reduction():
    model = create_model(SMALL)
    t, d, depth = 197, 384, 12
    blocks = depth * (4 * t * d * d + 2 * t * t * d + 8 * t * d * d)
    expected = 196 * 768 * d + blocks + d * 1000
    assert costs.count(model, convention="matmul").macs == expected


@pytest.mark.parametrize("name", ["none", "topk", "evit", "tdm", "evit+tdm"])
def test_matmul_convention_counts_the_lowered_program(name):
    model = create_model("vit", name, None if name == "none" else 0.5, **tiny(name))
    assert costs.count(model, convention="matmul").macs == lowered(model)


@pytest.mark.parametrize(
    ("settings", "read"),
    [({}, 1), ({"distilled": True}, 2), ({"num_registers": 4}, 1), ({"rotary": Rotary()}, 1)],
)
@pytest.mark.parametrize("name", ["none", "tdm"])
def test_of_the_last_block_only_what_the_head_reads_is_computed(name, settings, read):
    model = create_model("vit", name, None if name == "none" else 0.5, **tiny(name), **settings)
    assert model.read == read
    d, heads, t = model.width, model.num_heads, model.schedule[-1].attention + model.shape.prefix
    hidden = model.mlp_hidden
    whole = t * (4 * d * d + 2 * t * d + 2 * d * hidden)
    # q; the question to the tokens and the mixed tokens' values, of each head; the projection and
    # the MLP; logits and mixing.
    short = read * (d * d + 2 * heads * d * d + d * d + 2 * d * hidden)
    short += 2 * read * heads * t * d
    if model.rotary is not None:  # keys that are turned are made
        short += t * d * d + read * t * d - read * heads * (t * d + d * d)
    saved = costs.count(model, convention="matmul").macs - costs.executed(model)
    assert saved == whole - short
    assert costs.executed(model) == compiled(model, model.apply)


@dataclasses.dataclass(frozen=True)
class Family:
    """A small transformer, and the elementwise products, norms and means that it has beside DeiT's.

    Attributes:
      settings: beside `SIZES`.
      attention: of each token in a block's attention.
      mlp: of each token in its MLP.
      ends: before the first block and behind the last, of the n patch tokens that leave it.
    """

    settings: dict[str, Any]
    ends: Callable[[int], int]
    attention: int = 0
    mlp: int = 0


D, HIDDEN, SIZES = 16, 40, {"image_size": (16, 24), "patch_size": 4, "depth": 2, "num_heads": 2}
SIZES |= {"width": D, "mlp_ratio": 2.5, "num_classes": 3}
GATED = {"gated_mlp": True, "activation": "silu", "qkv_bias": "qv"}
FAMILIES = {
    # Four products a channel turn queries and keys; the factors of two branches; the gate.
    "dinov3": Family(
        {**GATED, "num_registers": 4, "layer_scale": True, "positions": "none",
         "rotary": Rotary(), "num_classes": 0},
        lambda n: (5 + n) * D, 4 * D + D, D + HIDDEN,
    ),
    # The gate and the norm behind it; one vector is normed.
    "eva02": Family(
        {**GATED, "mlp_norm": True, "rotary": Rotary(1e4, True, 16), "pool": "avg",
         "fc_norm": True},
        lambda n: D, 4 * D, 2 * HIDDEN,
    ),
    "dinov2": Family(
        {"layer_scale": True, "pool": "token_avg"}, lambda n: (1 + n) * D, D, D
    ),
    # The final norm; the query's scale and the norm before the head's MLP.
    "siglip": Family(
        {"class_token": False, "pool": "map", "num_classes": 0}, lambda n: n * D + 2 * D
    ),
    # A norm at either end.
    "clip": Family(
        {"pre_norm": True, "patch_bias": False, "head_bias": False},
        lambda n: 25 * D + (1 + n) * D,
    ),
    "mae": Family({"pool": "avg", "fc_norm": True}, lambda n: D),
}  # fmt: skip


def of_family(name, reducer="none"):
    return create_model("vit", reducer, **{**SIZES, **FAMILIES[name].settings})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sliced", [False, True])
def test_beside_its_products_a_family_counts_its_elementwise_terms(family, sliced):
    """Its `matmul` count is the program's; `Sliced` has a method's counts and no cost."""
    like = make_reducer("tdm", counts=(11, 6), layers=(0, 1))
    model = of_family(family, Sliced(like=like) if sliced else "none")
    extra, prefix = FAMILIES[family], model.shape.prefix
    enter, leave = ((24, 11), (11, 6)) if sliced else ((24, 24), (24, 24))
    expected = extra.ends(leave[-1])
    for n, m in zip(enter, leave, strict=True):
        t = prefix + n
        # A norm and the scale of two heads' logits; a norm.
        expected += t * (D + extra.attention) + 2 * t * t
        expected += (prefix + m) * (D + extra.mlp)
    if sliced and model.rotary is not None:
        # A token that has moved has two means and four angles; its place is a product with zeros
        # and ones over the patches.
        expected += 11 * (2 + 4) - 24 * 11 * 2
    if sliced and model.pooling.endswith("avg"):
        # So are the sizes that weigh the mean.
        expected -= 24 * 11 + 11 * 6
    products = costs.count(model, convention="matmul").macs
    assert costs.multiply_adds(model) - products == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["none", "tdm", "tome"])
def test_matmul_convention_counts_the_lowered_program_of_a_family(family, name):
    reducer = make_reducer(name, **({} if name == "none" else {"counts": (14,), "layers": (0,)}))
    model = of_family(family, reducer)
    assert costs.count(model, convention="matmul").macs == lowered(model)


def test_the_pooling_heads_query_costs_its_products_with_the_tokens():
    reducer = make_reducer("topk", importance="pool", counts=(11, 6), layers=(0, 1))
    model, free = of_family("siglip", reducer), of_family("siglip", Sliced(like=reducer))
    own = costs.multiply_adds(model) - costs.multiply_adds(free)
    # The norms, the means over two heads; once the norm's scale and the logits' in the query.
    elementwise = (24 + 11) * (D + 1) + 2 * 2 * D
    products = [costs.count(m, convention="matmul").macs for m in (model, free)]
    assert own - elementwise == products[0] - products[1] == (24 + 11) * 2 * D + 2 * D * D


def lowered(model):
    """The multiply-adds of the program that the compiler gets, when all tokens are asked for."""

    def answer(variables, images):
        return model.apply(variables, images, return_info=True)[0]

    return compiled(model, answer)


def compiled(model, function):
    images = jax.ShapeDtypeStruct((1, *model.image_size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return lowered_products(jax.jit(function).lower(variables, images).as_text())


def tiny(name):
    return {k: v for k, v in TINY.items() if name != "none" or k != "layers"}


def lowered_products(text: str) -> int:
    """Multiply-adds of the dots and convolutions in StableHLO, each function once per call."""
    bodies = re.split(r"func\.func (?:public |private )?@", text)[1:]
    functions = {body.split("(", 1)[0]: body for body in bodies}

    def of(name: str) -> int:
        total = 0
        for line in functions[name].splitlines():
            if call := re.search(r"(?:func\.)?call @(\w+)", line):
                total += of(call.group(1))
            elif "stablehlo.dot_general" in line:
                axes = re.search(r"contracting_dims = \[([\d, ]*)\]", line).group(1)
                left, out = operand_shapes(line)[0], operand_shapes(line)[-1]
                contracted = math.prod(left[int(axis)] for axis in axes.split(","))
                total += contracted * math.prod(out)
            elif "stablehlo.convolution" in line:
                _, kernel, out = operand_shapes(line)
                total += math.prod(kernel[:-1]) * math.prod(out)
        return total

    return of("main")


def operand_shapes(line: str) -> list[list[int]]:
    types = re.findall(r"tensor<([\dx]*)x?f32>", line.rsplit(" : ", 1)[1])
    return [[int(side) for side in shape.strip("x").split("x") if side] for shape in types]


@pytest.mark.slow
def test_activation_bytes_shrink_with_the_tokens_and_scale_with_the_depth():
    plain = create_model("vit", **tiny("none"))
    reduced = create_model("vit", "tdm", 0.3, **TINY)
    shallow = create_model("vit", **{**tiny("none"), "depth": 2})
    assert costs.activation_bytes(reduced) < costs.activation_bytes(plain)
    assert costs.activation_bytes(shallow) < 0.6 * costs.activation_bytes(plain)
    # At least the input of each linear map is kept: a lower bound in closed form.
    assert costs.activation_bytes(plain) >= 4 * 4 * 17 * 24 * (1 + 3 + 1 + 1 + 4)


def test_remat_keeps_fewer_bytes():
    plain = create_model("vit", **tiny("none"))
    assert costs.activation_bytes(plain.clone(remat=True)) < costs.activation_bytes(plain) / 2


def test_unknown_convention_is_refused():
    with pytest.raises(InputError, match="did you mean 'torchprofile'"):
        costs.count(SMALL, convention="torchprof")


@pytest.mark.slow
def test_a_model_keeps_its_reducer_unless_another_is_named():
    """Defect C: other settings dropped it, and "none" left it."""
    model = create_model(SMALL, "tdm", 0.7)
    assert costs.count(model).macs == costs.count(SMALL, "tdm", 0.7).macs
    assert round(costs.count(model, num_classes=10).gflops, 2) == 3.00
    assert costs.count(model, "none") == costs.count(SMALL)
    assert costs.count(model, keep_rate=0.5) == costs.count(SMALL, "tdm", 0.5)
    assert costs.count(model, "evit", 0.7, num_classes=1000) == costs.count(SMALL, "evit", 0.7)
