"""Schedules that fill tiles: all of them within the limit, and measured beside no reduction."""

import pytest

from tdm_jax import create_model, make_reducer
from tdm_jax.analysis import costs
from tdm_jax.analysis.candidate import Candidate
from tdm_jax.analysis.schedule_search import TILES, advice, advise, schedules
from tdm_jax.analysis.timing import BASELINE, Timing
from tdm_jax.errors import InputError

DEIT = create_model("deit_small_patch16_224", make_reducer("tdm"))
LIMIT = 3_010_000_000  # TDM at keep rate 0.7, and a little


def test_every_schedule_fills_its_tile_within_the_limit():
    by_tile = schedules(DEIT, LIMIT)
    assert by_tile[1].schedule.counts == (138, 97, 68)
    assert set(by_tile) <= set(TILES)
    assert len(set(by_tile.values())) == len(by_tile) > 4
    for tile, reducer in by_tile.items():
        assert costs.count(DEIT.clone(reducer=reducer)).macs <= LIMIT
        # 196 patches are all there are: nothing fills a tile beyond them.
        assert all((count + 1) % tile == 0 or count == 196 for count in reducer.schedule.counts)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "limit", "said"),
    [
        ("tdm", 5e9, r"less than the 4\.6.* G without reduction; got 5 G"),
        ("tdm", 1e8, r"TDM costs .* G at the least; got 0\.1 G"),
        ("none", 3e9, "method with a count for each stage; got Reducer"),
        ("tdm/preset=published", 3e9, "without counts"),
    ],
)
def test_what_cannot_be_says_so(method, limit, said):
    name, *preset = method.split("/preset=")
    reducer = make_reducer(name, **({"preset": preset[0]} if preset else {}))
    with pytest.raises(InputError, match=said):
        schedules(DEIT.clone(reducer=reducer), int(limit))


@pytest.mark.slow
def test_the_fastest_comes_first_and_the_baseline_last():
    model = create_model(
        "vit",
        make_reducer("topk", layers=(1,)),
        image_size=32,
        patch_size=4,
        in_channels=1,
        width=16,
        depth=2,
        num_heads=2,
        num_classes=10,
    )
    limit = costs.count(model).macs
    rows = advise(
        [Candidate("tiny", "topk", 0.7, model)],
        limit,
        batch_sizes=[2],
        dtypes=["float32"],
        timing=Timing(rounds=2, min_seconds=0.0, warmup=1),
    )
    assert rows[-1].verdict == BASELINE
    assert len(rows) == len(schedules(model, limit)) + 1
    speeds = [row.speedup for row in rows[:-1]]
    assert speeds == sorted(speeds, reverse=True)
    said = advice(rows)
    assert said.startswith(f"fastest: make_reducer('topk', layers=(1,), counts={rows[0].counts}")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sinkhorn", "sit", "patchmerger"])
def test_weights_whose_shapes_follow_the_counts(method, tiny_model):
    """Defect F: one tree of weights was given to every schedule."""
    model, variables = tiny_model(method, 0.5, layers=(1,), image_size=32)
    rows = advise(
        [Candidate("tiny", method, 0.5, model, variables)],
        costs.multiply_adds(model),
        batch_sizes=[1],
        dtypes=["float32"],
        timing=Timing(rounds=1, min_seconds=0.0, warmup=1),
    )
    assert len({row.counts for row in rows}) == len(rows) > 2
