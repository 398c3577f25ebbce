"""One table of all methods, and the properties that each of them must have.

A method is looked at twice: one stage alone, its hooks driven through blocks that compute nothing
(`Drive`), and two stages inside a small transformer whose batch is sharded over eight devices
(`Network`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tdm_jax import create_model, make_reducer, unmerge
from tdm_jax.models.attention import AttentionView
from tdm_jax.reduction import BlockContext, ViTShape, plan
from tdm_jax.reduction.contract import AttentionMap
from tdm_jax.reduction.soft_clusters import SoftClusters
from tdm_jax.reduction.token_state import TokenState
from tests.reduction.permutation import assert_alike, permuted

BATCH, GRID, WIDTH, HEADS, CLASSES = 8, (4, 6), 32, 2, 5
PATCHES = GRID[0] * GRID[1]
# Each program here runs a few times only: quick to compile beats quick to run.
QUICKLY = {"xla_backend_optimization_level": 0}


@dataclasses.dataclass(frozen=True)
class Row:
    """A method with settings, and what its definition exempts it from.

    Attributes:
      name: of the method.
      settings: for `make_reducer`, beside layers.
      class_token: whether the model has one; if so also a distillation and two register tokens.
      drops: tokens are dropped, so sizes need not sum to the number of patches.
      by_position: the choice depends on where a token stands, or on chance drawn by position.
      chance: the draw differs by place in the batch.
      gathers: what leaves are input tokens themselves, so that others get no gradient.
      returns: all patches are back at the end.
      build: builds the reducer for a depth, where a method knows no layers.
      quick: whether it is in the quick run.
    """

    name: str
    settings: tuple[tuple[str, Any], ...] = ()
    class_token: bool = True
    drops: bool = False
    by_position: bool = False
    chance: bool = False
    gathers: bool = False
    returns: bool = False
    build: Callable[[int], Any] | None = None
    quick: bool = True

    def __str__(self) -> str:
        settings = [f"{key}={value}" for key, value in self.settings]
        return ",".join([self.name, *settings, *["bare"] * (not self.class_token)])

    def reducer(self, layers: tuple[int, ...]) -> Any:
        if self.build is not None:
            return self.build(layers[-1] + 1)
        settings = dict(self.settings)
        if self.name != "none":
            settings["layers"] = layers
            if not settings.keys() & {"keep_rate", "r", "counts", "ratio"}:
                settings["keep_rate"] = 0.6
        return make_reducer(self.name, **settings)

    @property
    def prefix(self) -> int:
        return 4 if self.class_token else 0


def pruning(name: str, **options: Any) -> Row:
    return Row(name, drops=True, gathers=True, **options)


def slow(row: Row) -> Row:
    """Runs among the slow tests: another row of the method is in each quick run."""
    return dataclasses.replace(row, quick=False)


def slimmed(depth: int) -> Any:
    """PS-ViT with every other patch, then the last ones of these."""
    odd = tuple(range(1, PATCHES, 2))
    return make_reducer("psvit", sets=tuple(odd[i:] for i in range(depth + 1)))


def dropping(depth: int) -> Any:
    """DiffRate without merging; the first block removes nothing."""
    return make_reducer("diffrate", prune_kept=(PATCHES + 1, 16, 10)[:depth])


def merging_alike(depth: int) -> Any:
    return make_reducer("diffrate", merge_kept=(PATCHES + 1, 16, 10)[:depth])


def in_rows_and_columns(depth: int) -> Any:
    return make_reducer("cubist", block=1, remove_rows=2, remove_columns=3)


def compensated(depth: int) -> Any:
    return make_reducer("tocom", r=7, source_r=2, dim=16)


def halting(depth: int) -> Any:
    """A-ViT with a gate that opens on random tokens."""
    return make_reducer("avit", scale=2.0, center=1.0)


def halting_in_slots(depth: int) -> Any:
    return make_reducer("avit", scale=2.0, center=1.0, counts=(15, 9)[: depth - 1])


TABLE = (
    Row("none"),
    pruning("random", by_position=True, chance=True),
    pruning("topk"),
    pruning("topk", settings=(("importance", "mean"),)),
    pruning("topk", settings=(("importance", "key_norm"),), class_token=False),
    Row("evit"),
    Row("evit", (("importance", "mean"),), class_token=False),
    Row("tdm"),
    Row("tdm", (("preset", "published"),)),
    Row("tdm", (("preset", "diversity"),)),
    pruning("tdm", settings=(("preset", "importance"),)),
    Row("tdm", (("importance", "key_norm"), ("proportional_attention", True))),
    Row("tdm", (("importance", "mean"),), class_token=False),
    Row("tdm", (("importance", "shift"), ("grouping", "agglomeration"), ("metric", "keys"))),
    Row("topk+tdm", (("attentive_merge", "cluster"),)),
    Row("evit+tdm"),
    Row("tome", (("r", 7),), by_position=True),
    Row("tome", (("r", 7),), class_token=False, by_position=True),
    Row("pitome", (("ratio", 0.7),)),
    slow(Row("pitome", (("r", 5),), class_token=False)),
    pruning("tofu", settings=(("r", 7),), by_position=True),
    slow(Row("tofu", (("r", 7), ("strategy", "tofu")), by_position=True)),
    slow(Row("tofu", (("r", 7), ("strategy", "mlerp")), class_token=False, by_position=True)),
    Row("atc"),
    slow(Row("atc", (("linkage", "single"),))),
    slow(
        Row("atc", (("linkage", "complete"), ("proportional_attention", False)), class_token=False)
    ),
    Row("dtem", (("r", 7),), by_position=True),
    Row("mctf", (("r", 7),), by_position=True),
    slow(Row("mctf", (("r", 6), ("one_step_ahead", 2)), class_token=False, by_position=True)),
    slow(Row("mctf", (("r", 7), ("one_step_ahead", 0), ("pooling", 1)), by_position=True)),
    pruning("ppt", settings=(("threshold", 0.0),)),
    slow(Row("ppt", (("threshold", 1.0),), by_position=True)),
    Row("dpcknn"),
    Row("dpcknn_score"),
    Row("kmedoids", gathers=True),
    Row("sinkhorn"),
    Row("patchmerger"),
    Row("sit"),
    pruning("dyvit"),
    Row("dyvit+tdm"),
    Row("spvit"),
    Row("spvit", (("gate", True),), class_token=False),
    Row("spvit+tdm"),
    pruning("svite"),
    Row("svite+tdm"),
    pruning("iared2"),
    Row("iared2+tdm"),
    Row("evovit", (("head", "class"),), returns=True),
    Row("evovit+tdm", (("head", "class"),), returns=True),
    pruning("ats", by_position=True),
    Row("ats+tdm", by_position=True),
    Row("avit", build=halting, returns=True),
    Row("avit", (("counts", True),), build=halting_in_slots, returns=True),
    Row("diffrate", build=merging_alike),
    slow(pruning("diffrate", settings=(("merging", False),), build=dropping)),
    Row("cubist", by_position=True, build=in_rows_and_columns),
    Row("tocom", by_position=True, build=compensated),
    slow(Row("tocom", class_token=False, by_position=True, build=compensated)),
    pruning("psvit", by_position=True, build=slimmed),
)

# Eager execution compiles operation by operation, which is slow, and so does a network in bfloat16:
# once for each method. pytest groups tests by a row's place in the list, so those come first, and
# of those the ones without chance.
FIRST = sorted({row.name: row for row in reversed(TABLE)}.values(), key=lambda row: row.chance)
FIXED = [row for row in FIRST if not row.chance]
ROWS = [*FIRST, *(row for row in TABLE if row not in FIRST)]
once_for_each_method = pytest.mark.parametrize("row", FIRST, ids=str, indirect=True)


def param(row: Row, quick: bool = True) -> Any:
    marks = () if quick and row.quick else pytest.mark.slow
    return pytest.param(row, id=str(row), marks=marks)


@pytest.fixture(scope="module", params=[param(row) for row in ROWS])
def row(request):
    return request.param


class Drive:
    """The hooks of a method through two blocks that compute nothing, on random attention."""

    def __init__(self, row: Row):
        self.reducer = row.reducer((1,))
        self.shape = ViTShape(GRID, 2, WIDTH, HEADS, row.prefix, row.class_token)
        self.weights = self.reducer.init(jax.random.key(7), self.shape)
        keys = jax.random.split(jax.random.key(0), 3)
        self.prefix = jax.random.normal(keys[0], (BATCH, row.prefix, WIDTH))
        self.tokens = jax.random.normal(keys[1], (BATCH, PATCHES, WIDTH))
        total = row.prefix + PATCHES
        self.qkv = 2 * jax.random.normal(keys[2], (BATCH, 2, 3, total, HEADS, WIDTH // HEADS))

    def __call__(self, prefix: Any, tokens: Any, qkv: Any) -> TokenState:
        state = TokenState.start(prefix, tokens, keep_dropped=True)
        for layer in range(2):
            context = BlockContext(layer=layer, shape=self.shape, train=False, weights=self.weights)

            def view(state: TokenState, layer: int = layer) -> AttentionView:
                sees = state.prefix.shape[1] + state.count
                q, k, v = (qkv[:, layer, i, :sees].astype(tokens.dtype) for i in range(3))
                return AttentionView(
                    q, k, v, q[:, 0], None, state.prefix.shape[1], normed=state.sequence()
                )

            state = self.reducer.before_block(state, context.replace(preview=view))
            sees = state.prefix.shape[1] + state.count
            weight = self.reducer.key_weight(state, context)
            if isinstance(weight, AttentionMap):
                assert weight.map.shape == (tokens.shape[0], HEADS, sees, sees)
            else:
                assert weight is None or weight.shape == (tokens.shape[0], sees)
            context = context.replace(attention=view(state))
            state = self.reducer.after_attention(state, context)
            # What an MLP that repeats its tokens would have added.
            state = self.reducer.after_block(state, context.replace(update=state.tokens))
        return self.reducer.finish(state, self.shape)

    @functools.cached_property
    def by_image(self) -> Any:
        """The compiled hooks on each image alone: a gradient of the tokens, and the state."""

        def of_image(tokens, prefix, qkv):
            state = self(prefix[None], tokens[None], qkv[None])
            weights = jnp.cos(jnp.arange(state.tokens.size)).reshape(state.tokens.shape)
            fields = ("prefix", "tokens", "assign", "kind", "dropped_values")
            return (state.tokens * weights).sum(), {f: getattr(state, f)[0] for f in fields}

        run = jax.jit(jax.vmap(jax.grad(of_image, has_aux=True)))
        return run.lower(self.tokens, self.prefix, self.qkv).compile(QUICKLY)

    @functools.cached_property
    def compiled(self) -> Any:
        return self.by_image(self.tokens, self.prefix, self.qkv)


@pytest.fixture(scope="module")
def drive(row):
    return Drive(row)


def test_counts_are_the_scheduled_ones(row, drive):
    scheduled = plan(drive.reducer, drive.shape)[-1].out
    assert drive.compiled[1]["tokens"].shape == (BATCH, scheduled, WIDTH)
    assert scheduled == PATCHES if row.name == "none" or row.returns else scheduled < PATCHES


def test_prefix_tokens_pass(drive):
    # A-ViT sums up its blocks' outputs, with weights that add up to 1.
    np.testing.assert_allclose(drive.compiled[1]["prefix"], drive.prefix, rtol=1e-6)


def test_dropped_patches_leave_their_last_value(drive):
    # The blocks compute nothing, so a patch that was never merged still has its first value.
    state = drive.compiled[1]
    dropped = np.asarray(state["assign"]) < 0
    np.testing.assert_array_equal(
        np.asarray(state["dropped_values"])[dropped], np.asarray(drive.tokens)[dropped]
    )


# ToCom's hooks are ToMe's, in every block.
@pytest.mark.parametrize("row", [param(row, row.name != "tocom") for row in FIXED], indirect=True)
def test_compiled_image_by_image_equals_the_eager_batch(drive):
    eager, state = drive(drive.prefix, drive.tokens, drive.qkv), drive.compiled[1]
    np.testing.assert_array_equal(state["assign"], eager.assign)
    np.testing.assert_array_equal(state["kind"], eager.kind)
    np.testing.assert_allclose(state["tokens"], eager.tokens, atol=1e-5)


def test_gradients_reach_the_tokens(row, drive):
    gradient, state = drive.compiled
    assert np.isfinite(gradient).all()
    reached = (np.abs(gradient) > 0).any(-1)
    if row.gathers:
        np.testing.assert_array_equal(reached.sum(1), state["tokens"].shape[1])
    else:
        assert reached.all()


def test_bfloat16_chooses_alike(row, drive):
    rounded = [x.astype(jnp.bfloat16) for x in (drive.tokens, drive.prefix, drive.qkv)]

    def run(tokens, prefix, qkv):
        state = drive(prefix, tokens, qkv)
        return state.tokens, state.assign

    tokens, assign = jax.jit(run).lower(*rounded).compile(QUICKLY)(*rounded)
    assert tokens.dtype == jnp.bfloat16
    if row.chance:
        return
    _, expected = drive.by_image(*(x.astype(jnp.float32) for x in rounded))
    # Scores and distances are float32's: equal tokens, equal choices.
    np.testing.assert_array_equal(assign, expected["assign"])
    np.testing.assert_allclose(tokens.astype(jnp.float32), expected["tokens"], atol=0.05)


class Network:
    """Three blocks, with stages in the last two; the batch is sharded over 8 devices."""

    def __init__(self, row: Row):
        self.model = create_model(
            "vit",
            row.reducer((1, 2)),
            image_size=(8 * GRID[0], 8 * GRID[1]),
            patch_size=8,
            width=WIDTH,
            depth=3,
            num_heads=HEADS,
            num_classes=CLASSES,
            class_token=row.class_token,
            distilled=row.class_token,
            num_registers=2 * row.class_token,
        )
        self.images = jax.random.normal(jax.random.key(1), (BATCH, 8 * GRID[0], 8 * GRID[1], 3))
        shapes = jax.eval_shape(self.model.init, jax.random.key(0), self.images)
        draw = np.random.default_rng(2)
        # Larger than at initialisation, so that attention is uneven.
        self.params = jax.tree.map(
            lambda leaf: jnp.asarray(0.3 * draw.standard_normal(leaf.shape), leaf.dtype), shapes
        )
        self.traces = 0
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        self.split = NamedSharding(mesh, PartitionSpec("data"))
        self.whole = NamedSharding(mesh, PartitionSpec())
        self.forward = jax.jit(self._forward, in_shardings=(self.whole, self.split))

    def _forward(self, params, images):
        self.traces += 1
        logits, info = self.model.apply(params, images, return_info=True)
        return logits, info, unmerge(info), unmerge(info, fill=-7.0)

    @functools.cached_property
    def compiled(self):
        return self.forward.lower(self.params, self.images).compile(QUICKLY)

    def __call__(self, params, images):
        return self.compiled(jax.device_put(params, self.whole), jax.device_put(images, self.split))

    @functools.cached_property
    def answer(self):
        return self(self.params, self.images)

    @functools.cached_property
    def in_bfloat16(self):
        """A gradient of the parameters, the logits and `Info`, computed in bfloat16."""
        model = self.model.clone(dtype=jnp.bfloat16)

        def loss(params):
            logits, info = model.apply(params, self.images, return_info=True)
            return (logits**2).mean(), (logits, info)

        run = jax.jit(jax.grad(loss, has_aux=True)).lower(self.params).compile(QUICKLY)
        return run(self.params)


@pytest.fixture(scope="module")
def network(row):
    return Network(row)


def test_the_transformer_has_the_scheduled_tokens(row, network):
    logits, info, *_ = network.answer
    assert logits.shape == (BATCH, CLASSES)
    assert np.isfinite(logits).all()
    assert info.token_counts == tuple(block.out for block in network.model.schedule)
    assert info.features.shape == (BATCH, row.prefix + info.token_counts[-1], WIDTH)
    assert info.size.shape == (BATCH, info.token_counts[-1])


def test_sizes_count_the_patches_that_the_source_map_assigns(row, network):
    info = network.answer[1]
    assert info.assign.shape == (BATCH, PATCHES)
    for assign, size in zip(np.asarray(info.assign), np.asarray(info.size), strict=True):
        np.testing.assert_array_equal(np.bincount(assign[assign >= 0], minlength=len(size)), size)
        assert (assign >= -1).all()
    assert (info.assign < 0).any() if row.drops else (info.size.sum(1) == PATCHES).all()


@pytest.mark.slow
@once_for_each_method
def test_gradients_reach_the_patch_embedding(network):
    gradient, _ = network.in_bfloat16
    for path, leaf in jax.tree.leaves_with_path(gradient):
        assert np.isfinite(leaf).all(), path
    kernel = np.abs(gradient["params"]["patch_embed"]["proj"]["kernel"])
    assert (kernel.max(axis=(0, 1, 2)) > 1e-6).all()


@once_for_each_method
def test_bfloat16_answers_alike_where_it_chooses_alike(network):
    _, (logits, info) = network.in_bfloat16
    expected, exact, *_ = network.answer
    alike = np.ones(BATCH, bool)
    # The source map of soft clusters decides nothing.
    if not isinstance(network.model.reducer, SoftClusters):
        for stage, other in zip(info.stages, exact.stages, strict=True):
            alike &= (np.asarray(stage.assign) == np.asarray(other.assign)).all(axis=1)
    assert alike.any()
    # Logits reach 0.5; eight bits through three blocks.
    np.testing.assert_allclose(logits[alike], expected[alike], atol=0.03)


def test_no_collective_when_the_batch_is_sharded(network):
    program = network.compiled.as_text()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in program


def test_nothing_is_scattered_or_computed_in_float64(network):
    program = network.compiled.as_text()
    assert " scatter(" not in program
    assert "f64[" not in program


def test_permuting_the_patches_changes_nothing_but_order(row, network):
    order = np.random.default_rng(3).permutation(PATCHES)
    params, images = permuted(network.params, network.images, GRID, order)
    logits, info, *_ = network(params, images)
    before, old, *_ = network.answer
    if row.by_position:
        assert np.abs(logits - before).max() > 1e-3
        return
    np.testing.assert_allclose(logits, before, atol=1e-4)
    assert_alike(info, old, order)


def test_a_row_does_not_depend_on_its_neighbours(network):
    others = network.images.at[1:].set(network.images[1:][::-1] * 3)
    logits, info, *_ = network(network.params, others)
    before, old, *_ = network.answer
    np.testing.assert_array_equal(logits[0], before[0])
    np.testing.assert_array_equal(info.assign[0], old.assign[0])


def test_unmerge_returns_the_full_grid(network):
    _, info, *in_one_program = network.answer
    # On its own the full grid is exact; in the program of the network a sum may be rounded twice.
    dense, filled = jax.jit(lambda info: (unmerge(info), unmerge(info, fill=-7.0)))(info)
    for alone, fused in zip((dense, filled), in_one_program, strict=True):
        np.testing.assert_allclose(fused, alone, rtol=1e-6, atol=1e-7)
    assert dense.shape == filled.shape == (BATCH, PATCHES, WIDTH)
    assert np.isfinite(dense).all()
    assign, features = np.asarray(info.assign), np.asarray(info.features)[:, info.prefix :]
    for image, patch in [(0, 0), (3, 7), (7, PATCHES - 1)]:
        token = assign[image, patch]
        expected = np.full(WIDTH, -7.0) if token < 0 else features[image, token]
        np.testing.assert_array_equal(filled[image, patch], expected)
    kept = assign >= 0
    np.testing.assert_array_equal(np.asarray(dense)[kept], np.asarray(filled)[kept])


def test_one_trace_per_shape(network):
    network.forward.lower(network.params, network.images)
    traces = network.traces
    network.forward.lower(network.params, network.images + 1)
    assert network.traces == traces
    network.forward.lower(network.params, jnp.zeros((16, *network.images.shape[1:])))
    assert network.traces == traces + 1


@pytest.mark.parametrize("name", ["tdm", "kmedoids"])
def test_rematerialisation_changes_nothing(name):
    # K-Medoids hands something from block to block, TDM does most within one.
    network = Network(Row(name))

    def loss(remat, params):
        logits = network.model.clone(remat=remat).apply(params, network.images[:2])
        return (logits**2).sum()

    values, gradients = zip(
        *(
            jax.jit(jax.value_and_grad(functools.partial(loss, remat)))
            .lower(network.params)
            .compile(QUICKLY)(network.params)
            for remat in (False, True)
        ),
        strict=True,
    )
    np.testing.assert_allclose(*values, rtol=1e-5)
    for plain, again in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(plain, again, rtol=1e-3, atol=1e-3)
