"""The benchmark's rows, its free twins, and what happens when memory runs out.

Covers tdm_jax.benchmark.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax import benchmark as command
from tdm_jax import create_model, make_reducer
from tdm_jax.analysis import benchmark as bench
from tdm_jax.analysis import costs, timing
from tdm_jax.analysis.benchmark import benchmark
from tdm_jax.analysis.candidate import Candidate
from tdm_jax.analysis.timing import Timing
from tdm_jax.errors import InputError
from tdm_jax.reduction import Reducer
from tdm_jax.reduction.sliced import Sliced
from tests import commands

TINY = {
    "image_size": 16,
    "patch_size": 4,
    "in_channels": 1,
    "width": 16,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 10,
}
QUICK = Timing(rounds=2, min_seconds=0.0, warmup=1)


def tiny(method="topk", rate=0.5):
    model = create_model("vit", make_reducer(method, keep_rate=rate, layers=(1,)), **TINY)
    return Candidate("tiny", method, rate, model)


@pytest.fixture(scope="module")
def rows():
    done = []
    found = benchmark([tiny()], batch_sizes=[2], dtypes=["float32"], timing=QUICK, done=done.append)
    assert [row for group in done for row in group] == found
    return found


@pytest.mark.slow
def test_rows_come_with_their_baseline(rows):
    assert [(row.mode, row.method) for row in rows] == [
        ("forward", "none"),
        ("forward", "topk"),
        ("train", "none"),
        ("train", "topk"),
    ]
    for base, reduced in (rows[:2], rows[2:]):
        assert base.speedup == 1.0
        assert base.verdict == timing.BASELINE
        assert base.reduction_share is None
        assert reduced.reduction_share < 1


def test_figures_follow_from_each_other(rows):
    for row in rows:
        assert row.compile_seconds > 0
        assert row.memory_bytes > 0
        low, high = row.latency_quartiles
        assert low <= row.latency_seconds <= high
    forward = rows[1]
    macs = costs.executed(tiny().model)
    expected = 2 * macs * forward.images_per_second
    assert forward.flops_per_second == pytest.approx(expected)
    assert 0 < forward.matmul_share < 1
    # A training step holds gradients and moments too.
    assert rows[2].memory_bytes > 3 * rows[0].memory_bytes


def test_a_step_of_training_trains():
    candidate = tiny()
    program = bench.compile_training(candidate.model, candidate.any_variables(), 2)
    losses = [float(program.call()["loss"]) for _ in range(3)]
    assert len(set(losses)) == 3


# One small model of each family: its own parts, far fewer channels and blocks.
FAMILIES = (
    *("deit_tiny_distilled_patch16_224", "deit3_small_patch16_224", "vit_tiny_patch16_224"),
    *("vit_base_patch16_224.mae", "vit_small_patch16_224.dino", "vit_small_patch14_dinov2"),
    *("vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3", "eva02_base_patch14_448"),
    *("eva02_tiny_patch14_224", "vit_base_patch16_siglip_224", "vit_base_patch16_siglip_gap_224"),
    *("vit_base_patch16_clip_224", "vit_base_patch16_clip_quickgelu_224"),
)


# No head, and one that attends; the others run among the slow tests.
QUICK_FAMILIES = {"vit_small_patch14_reg4_dinov2", "vit_base_patch16_siglip_224"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK_FAMILIES else pytest.mark.slow)
        for name in FAMILIES
    ],
)
def test_every_family_trains(name):
    """A model without a head is given one."""
    patch = create_model(name).patch_size
    small = {"image_size": 2 * patch, "width": 8, "depth": 1, "num_heads": 2}
    model = create_model(name, make_reducer("tdm", keep_rate=0.5, layers=(0,)), **small)
    variables = Candidate(name, "tdm", 0.5, model).any_variables()
    program = bench.COMPILE["train_remat"](model, variables, 2)
    losses = [float(program.call()["loss"]) for _ in range(2)]
    assert np.isfinite(losses).all() and losses[0] != losses[1]


def test_without_timing_programs_are_compiled_alone():
    def make(model, variables, batch_size):
        return timing.Program(
            pytest.fail, batch_size, 1.5, 100 if model.reducer == Reducer() else 60
        )

    rows = benchmark(
        [tiny()],
        batch_sizes=[16],
        modes=["train"],
        dtypes=["float32"],
        timing=None,
        compilers={"train": make},
    )
    assert [row.memory_bytes for row in rows] == [100, 60]
    assert {(row.verdict, row.compile_seconds) for row in rows} == {(bench.NOT_RUN, 1.5)}
    assert rows[1].latency_seconds is rows[1].speedup is rows[1].matmul_share is None


@pytest.mark.parametrize("method", ["topk", "tome", "evovit", "ats", "dpcknn"])
def test_a_twin_has_the_counts_of_its_method(method):
    settings = {"layers": (1,)} if method != "tome" else {}
    like = make_reducer(method, keep_rate=0.5, **settings)
    model = create_model("vit", like, **TINY)
    twin = model.clone(reducer=Sliced(like=like))
    assert twin.schedule == model.schedule
    images = jnp.ones((2, 16, 16, 1))
    params = jax.jit(twin.init)(jax.random.key(0), images)
    _, info = jax.jit(lambda p, x: twin.apply(p, x, return_info=True))(params, images)
    assert info.token_counts == tuple(block.out for block in model.schedule)
    # The first tokens, in their order: nothing was looked at.
    kept = np.asarray(info.assign)
    assert (kept[0] == kept[1]).all()
    assert (kept[0][kept[0] >= 0] == np.arange((kept[0] >= 0).sum())).all()


def test_running_out_of_memory_is_a_row(monkeypatch):
    def make(model, variables, batch_size):
        if batch_size > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating")
        return timing.compile_forward(model, variables, batch_size)

    monkeypatch.setitem(bench.COMPILE, "forward", make)
    found = benchmark(
        [tiny()], batch_sizes=[1, 4], modes=["forward"], dtypes=["float32"], timing=QUICK
    )
    assert [row.batch_size for row in found] == [1, 1, 4, 4]
    assert found[1].speedup > 0
    assert [row.verdict for row in found[2:]] == [bench.OUT_OF_MEMORY] * 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"modes": ["backward"]}, "unknown mode 'backward'"),
        ({"dtypes": ["float8"]}, "unknown dtype 'float8'"),
        ({"batch_sizes": []}, "batch sizes of at least 1"),
        ({"batch_sizes": [0]}, r"batch sizes of at least 1; got \[0\]"),
    ],
)
def test_bad_input(wrong, message):
    with pytest.raises(InputError, match=message):
        benchmark([tiny()], **{"batch_sizes": [1], "timing": QUICK, **wrong})


@pytest.mark.slow
def test_the_command_writes_as_it_goes(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "make_candidates", lambda **names: [tiny()])
    quick = ("--batch_sizes=1", "--modes=forward", "--rounds=2", "--min_seconds=0")
    commands.run(command, *quick, "--dtypes=bfloat16", f"--output={tmp_path}")
    written = json.loads((tmp_path / "benchmark.json").read_text())
    assert written["about"]["jax"] == jax.__version__
    assert [row["dtype"] for row in written["rows"]] == ["bfloat16"] * 2
    assert "| In reduction |" in capsys.readouterr().out
    assert "load" in (tmp_path / "benchmark.md").read_text()
    limit = costs.count(tiny().model).macs / 1e9
    commands.run(command, *quick, "--dtypes=float32", f"--advise={limit}", f"--output={tmp_path}")
    assert "fastest: make_reducer('topk', layers=(1,), counts=" in capsys.readouterr().out
    assert "Tokens after each stage" in (tmp_path / "advice.md").read_text()
