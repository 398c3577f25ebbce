"""Every method in the families that differ from DeiT in where tokens stand and what reads them.

A program each, of a small network; what a method must be in any transformer is in test_common.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters.partial_eval import dce_jaxpr

from tdm_jax import create_model, make_reducer
from tdm_jax.errors import InputError
from tdm_jax.models.block import Block
from tdm_jax.models.rotary import Rotary
from tdm_jax.reduction import StageReducer, list_reducers, plan
from tdm_jax.reduction.registry import REDUCERS
from tests.reduction.permutation import assert_alike, permuted

GRID, WIDTH, HEADS, BATCH = (4, 6), 32, 2, 2
PATCHES = GRID[0] * GRID[1]
PLACES = np.indices(GRID).reshape(2, -1).T.astype(np.float32)
IMAGES = jax.random.normal(jax.random.key(1), (BATCH, 16, 24, 3))
QUICKLY = {"xla_backend_optimization_level": 0}
SIZES = dict(image_size=(16, 24), patch_size=4, width=WIDTH, depth=3, num_heads=HEADS)


@dataclasses.dataclass(frozen=True)
class Watched(Rotary):
    """Tells where each block has been told that the tokens are: all its answers, in a list each.

    Its attention asks last. Before it a method may have asked for a preview.
    """

    seen: ClassVar[list[list[Any]]] = []

    def rotation(self, positions, grid, prefix, channels):
        if self.seen:  # a forward pass is watched
            self.seen[-1].append(positions)
        return super().rotation(positions, grid, prefix, channels)

    @classmethod
    def block(cls, call, args, kwargs, context):
        """Starts a list where a block starts."""
        if isinstance(context.module, Block) and context.method_name == "__call__":
            cls.seen.append([])
        return call(*args, **kwargs)


FAMILIES = {
    # A class token and registers, neither placed.
    "dinov3": dict(num_registers=4, qkv_bias="qv", gated_mlp=True, activation="silu",
                   layer_scale=True, positions="none", rotary=Watched(), num_classes=0),
    "siglip": dict(class_token=False, pool="map", activation="gelu_tanh", num_classes=0),
    "mae": dict(pool="avg", fc_norm=True, num_classes=5),
    "clip": dict(pre_norm=True, patch_bias=False, activation="quick_gelu", head_bias=False,
                 num_classes=5),
}  # fmt: skip


def stages(name: str, **settings: Any) -> Any:
    return make_reducer(name, counts=(15, 9), layers=(1, 2), **settings)


ALL = tuple(range(PATCHES))
METHODS = {
    **{name: stages(name) for name, point in REDUCERS.items() if isinstance(point, StageReducer)},
    "tdm": stages("tdm"),
    "tdm/shift": stages("tdm", importance="shift"),
    "tdm/pool": stages("tdm", importance="pool"),
    "evovit": make_reducer("evovit", keep_rate=0.5, layers=(1, 2)),
    "avit": make_reducer("avit", scale=2.0, center=1.0, counts=(15, 9)),
    "psvit": make_reducer("psvit", sets=(ALL, ALL[::2], ALL[6::2], ALL[14::2])),
    "diffrate": make_reducer("diffrate", prune_kept=(99, 20, 14), merge_kept=(99, 16, 10)),
    "cubist": make_reducer("cubist", block=1, remove_rows=1, remove_columns=2),
    "tocom": make_reducer("tocom", r=5, source_r=1, dim=16),
}  # fmt: skip
# PPT scores by the class token's attention, and DiffRate drops by it.
NEED_CLASS_TOKEN = {"evovit", "ats", "psvit", "iared2", "diffrate", "ppt"}
NO_KEEP_RATE = {"avit", "psvit", "diffrate", "cubist", "tocom"}
# Or by chance.
BY_POSITION = {"random", "tome", "tocom", "tofu", "dtem", "mctf", "cubist", "ats", "psvit", "ppt"}
# A token counts in the attention as often as it has patches; by default, and without a class token.
PROPORTIONAL = {"tome", "tocom", "dtem", "atc", "mctf"}
# What differs in kind; the others run among the slow tests.
QUICK = {
    "none",
    "random",
    "evit",
    "evovit",
    "tdm",
    "tdm/shift",
    "tdm/pool",
    "tome",
    "sit",
    "dyvit",
    "ats",
    "avit",
    "diffrate",
    "cubist",
    "mctf",
}
CASES = [
    *(("dinov3", name) for name in METHODS if name != "tdm/pool"),
    *(("siglip", name) for name in METHODS if name not in NEED_CLASS_TOKEN),
    # Means weigh what has been fused, merged, packed, brought back, or left empty.
    *(("mae", name) for name in ("evit", "tdm", "tome", "sit", "spvit", "ats", "avit", "diffrate")),
    *(("clip", name) for name in ("tdm/shift", "evovit")),
]


def family_model(family, reducer="none"):
    return create_model("vit", reducer, **{**SIZES, **FAMILIES[family]})


@functools.cache
def variables(model):
    """Larger than at initialisation, so that attention is uneven."""
    draw = np.random.default_rng(2)
    shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * draw.standard_normal(leaf.shape), leaf.dtype), shapes
    )


class Case:
    """A method in a family: what it answers, and where it says that tokens are in each block."""

    def __init__(self, family, name):
        self.family, self.name = family, name
        self.model = family_model(family, METHODS[name])
        # A method without weights of its own has the family's.
        learned = self.model.reducer.learned
        self.params = variables(self.model if learned else family_model(family))

    def forward(self, params, images):
        everywhere = tuple(range(self.model.depth))
        with nn.intercept_methods(Watched.block):
            out, info = self.model.apply(params, images, return_info=True, intermediates=everywhere)
        answers = list(Watched.seen)
        Watched.seen.clear()
        return out, info, answers

    @functools.cached_property
    def compiled(self):
        return jax.jit(self.forward).lower(self.params, IMAGES).compile(QUICKLY)

    @functools.cached_property
    def answer(self):
        return self.compiled(self.params, IMAGES)


def param(family, name):
    marks = () if name in QUICK else pytest.mark.slow
    return pytest.param((family, name), id=f"{family}-{name}", marks=marks)


@pytest.fixture(scope="module", params=[param(*case) for case in CASES])
def case(request):
    return Case(*request.param)


def test_the_source_map_is_a_partition_and_the_prefix_passes(case):
    out, info, _ = case.answer
    assert np.isfinite(out).all()
    schedule = plan(case.model.reducer, case.model.shape)
    assert info.token_counts == tuple(block.out for block in schedule)
    for block, stage in zip(schedule, info.intermediates, strict=True):
        assert stage.features.shape == (BATCH, case.model.shape.prefix + block.out, WIDTH)
        for assign, size in zip(np.asarray(stage.assign), np.asarray(stage.size), strict=True):
            counted = np.bincount(assign[assign >= 0], minlength=block.out)
            np.testing.assert_array_equal(counted, size)


def test_a_row_does_not_depend_on_its_neighbours(case):
    others = case.compiled(case.params, IMAGES.at[1].multiply(3.0))
    np.testing.assert_array_equal(others[0][0], case.answer[0][0])
    np.testing.assert_array_equal(others[1].assign[0], case.answer[1].assign[0])


def test_permuting_the_patches_changes_nothing_but_order(case):
    if case.name in BY_POSITION or case.family == "dinov3":
        pytest.skip("goes by position, by chance, or has rotary positions, which are no parameters")
    order = np.random.default_rng(3).permutation(PATCHES)
    params, images = permuted(case.params, IMAGES, GRID, order)
    out, info, _ = case.compiled(params, images)
    before, old, _ = case.answer
    np.testing.assert_allclose(out, before, atol=1e-4)
    assert_alike(info, old, order)


def of_family(family):
    pairs = [param(*pair) for pair in CASES if pair[0] == family]
    return pytest.mark.parametrize("case", pairs, indirect=True)


@of_family("dinov3")
def test_a_token_stands_at_the_mean_of_its_patches(case):
    _, info, answers = case.answer
    schedule = plan(case.model.reducer, case.model.shape)
    # MCTF looks at the attention of what enters a block in which it fuses.
    assert [len(block) for block in answers] == ([1, 2, 2] if case.name == "mctf" else [1, 1, 1])
    positions = [block[-1] for block in answers]
    for block, previous in zip(answers[1:], positions, strict=False):
        if len(block) > 1:
            np.testing.assert_array_equal(block[0], previous)
    np.testing.assert_array_equal(positions[0][0], PLACES)
    for layer in (1, 2):
        where = np.broadcast_to(positions[layer], (BATCH, *positions[layer].shape[1:]))
        assert where.shape == (BATCH, schedule[layer].attention, 2)
        if case.name == "evovit":
            # All patches are back behind the block: those within it are patches, each itself.
            assert all(len({*map(tuple, image)} & {*map(tuple, PLACES)}) == 12 for image in where)
            continue
        before = case.name == "mctf" or getattr(case.model.reducer, "before", False)
        assign = np.asarray(info.intermediates[layer - (not before)].assign)
        for image, owners in zip(where, assign, strict=True):
            for token, place in enumerate(image):
                own = PLACES[owners == token]
                if len(own) == 1:
                    np.testing.assert_array_equal(place, own[0])
                elif len(own):
                    np.testing.assert_allclose(place, own.mean(axis=0), rtol=1e-6)


def norm(x, params):
    spread = np.sqrt(x.var(axis=-1, keepdims=True) + 1e-6)
    return (x - x.mean(axis=-1, keepdims=True)) / spread * params["scale"] + params["bias"]


@of_family("mae")
def test_a_mean_counts_a_token_as_often_as_it_stands_for_patches(case):
    out, info, _ = case.answer
    params = jax.tree.map(np.asarray, case.params["params"])
    size = np.asarray(info.size) * (1 if info.valid is None else np.asarray(info.valid))
    tokens = np.asarray(info.features)[:, info.prefix :]
    mean = (size[..., None] * tokens).sum(axis=1) / size.sum(axis=1, keepdims=True)
    expected = norm(mean, params["fc_norm"]) @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


@of_family("siglip")
def test_a_pooling_query_sees_sizes_where_the_attention_does(case):
    out, info, _ = case.answer
    params = jax.tree.map(np.asarray, case.params["params"]["attn_pool"])

    def dense(x, name):
        return x @ params[name]["kernel"] + params[name]["bias"]

    def heads(x):
        return x.reshape(*x.shape[:-1], HEADS, -1)

    keys, values = map(heads, np.split(dense(np.asarray(info.features), "kv"), 2, axis=-1))
    query = heads(dense(params["latent"][0, 0], "q"))
    weight = np.exp(np.einsum("hk,bnhk->bhn", query, keys) / np.sqrt(WIDTH // HEADS))
    if case.name in PROPORTIONAL:
        assert np.asarray(info.size).max() > 1
        weight = weight * np.asarray(info.size)[:, None]
    share = weight / weight.sum(axis=-1, keepdims=True)
    x = dense(np.einsum("bhn,bnhk->bhk", share, values).reshape(BATCH, WIDTH), "proj")
    mlp = params["mlp"]
    hidden = norm(x, params["norm"]) @ mlp["fc1"]["kernel"] + mlp["fc1"]["bias"]
    hidden = np.asarray(jax.nn.gelu(hidden, approximate=True))
    expected = x + hidden @ mlp["fc2"]["kernel"] + mlp["fc2"]["bias"]
    np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("family", "name"),
    [("dinov3", "tdm/shift"), ("siglip", "tdm/pool"), ("mae", "tome"), ("clip", "evit")],
)
def test_gradients_are_finite_and_reach_the_patches(family, name):
    model = family_model(family, METHODS[name])
    params = variables(family_model(family))

    def loss(params):
        return (model.apply(params, IMAGES) ** 2).mean()

    gradient = jax.jit(jax.grad(loss)).lower(params).compile(QUICKLY)(params)
    for path, leaf in jax.tree.leaves_with_path(gradient):
        assert np.isfinite(leaf).all(), path
    kernel = np.abs(gradient["params"]["patch_embed"]["proj"]["kernel"])
    assert (kernel.max(axis=(0, 1, 2)) > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("case", [("dinov3", "tome")], ids="-".join, indirect=True)
def test_compiled_equals_eager_on_one_image(case):
    out, info, answers = case.forward(case.params, IMAGES[:1])
    expected, compiled, where = case.answer
    np.testing.assert_allclose(out, expected[:1], atol=1e-4)
    np.testing.assert_array_equal(info.assign, compiled.assign[:1])
    for eager, place in zip(*map(jax.tree.leaves, (answers, where)), strict=True):
        np.testing.assert_array_equal(eager, place[:1])


@functools.cache
def program(model):
    """What runs, without the method's own weights, and without what no answer needs."""
    backbone = variables(model.clone(reducer=make_reducer("none")))["params"]
    own = variables(model)["params"].get("reducer")

    def apply(backbone, images):
        params = backbone if own is None else {**backbone, "reducer": own}
        return model.apply({"params": params}, images)

    traced = jax.make_jaxpr(apply)(backbone, IMAGES).jaxpr
    return str(dce_jaxpr(traced, [True] * len(traced.outvars))[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("dinov3", [name for name in METHODS if name not in {*NO_KEEP_RATE, "tdm/pool"}]),
        ("siglip", ["tome", "tdm/pool"]),
        ("mae", ["tome", "evovit"]),
    ],
)
def test_a_keep_rate_of_1_is_the_program_without_reduction(family, names):
    for name in names:
        reducer = METHODS[name].at_keep_rate(1.0)
        if name == "evovit":
            reducer = dataclasses.replace(reducer, head="class")
        assert program(family_model(family, reducer)) == program(family_model(family)), name


@pytest.mark.parametrize(
    ("family", "reducer", "message"),
    [
        *(("siglip", name, "class token to go by; the model has none")
          for name in ("evovit", "ats", "psvit", "ppt")),
        ("siglip", "iared2", "its own importance needs a class token and the model has none"),
        ("siglip", "tdm/importance=class", "needs a class token and the model has none"),
        ("dinov3", "tdm/importance=pool", "needs a pooling head and the model has none"),
        ("mae", "evovit", "the model's reads 'avg'; expected head='class'"),
        ("mae", "psvit", "the model's head reads 'avg'"),
        ("dinov3", "evit/importance=shift/layers=all", "expected layers from 1"),
    ],
)  # fmt: skip
def test_what_a_method_cannot_mean_is_refused_in_one_line(family, reducer, message):
    name, *settings = reducer.split("/")
    chosen = dict(setting.split("=") for setting in settings)
    if name != "psvit":
        chosen.setdefault("layers", (1, 2))
    with pytest.raises(InputError, match=message) as refused:
        family_model(family, make_reducer(name, **chosen))
    assert "\n" not in str(refused.value)


def test_every_method_runs_on_the_families_it_can():
    names = {name for name in list_reducers() if not name.endswith("+tdm")} - {"none"}
    assert names <= {name for family, name in CASES if family == "dinov3"}
    assert names - NEED_CLASS_TOKEN <= {name for family, name in CASES if family == "siglip"}
