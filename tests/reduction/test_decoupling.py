"""How many tokens each side of a stage leaves: published counts, the poles, what is refused."""

import numpy as np
import pytest

from tdm_jax import make_reducer
from tdm_jax.errors import InputError
from tdm_jax.reduction import ViTShape, plan
from tdm_jax.reduction.decoupling import PRESETS, Counts, Decoupling, Rates

DEIT = ViTShape((14, 14), 12, 384, 6)


@pytest.mark.parametrize(
    ("keep_rate", "expected"),
    [
        (0.7, (138, 97, 69)),
        (0.6, (116, 69, 42)),
        (0.5, (102, 53, 28)),
        (0.4, (82, 36, 17)),
        (0.3, (59, 20, 8)),
        (0.2, (40, 10, 4)),
    ],
)
def test_published_counts(keep_rate, expected):
    blocks = plan(make_reducer("tdm", keep_rate=keep_rate, preset="published"), DEIT)
    assert tuple(blocks[layer].out for layer in (3, 6, 9)) == expected


def counts(decoupling, n, keep_rate, target=None, exact=False):
    target = int(np.ceil(keep_rate * n)) if target is None else target
    return decoupling.counts("Name", n, keep_rate, target, exact)


def test_derived_rates_leave_the_keep_rate():
    """TDM.md: match 1 - (1 - k) / 4, cluster k / 2, and attentive what makes the sum k."""
    rates = Decoupling().rates("Name", 0.6)
    assert rates == Rates(pytest.approx(0.3 / 0.6), pytest.approx(0.9), pytest.approx(0.3), False)
    left = rates.attentive * rates.match + (1 - rates.attentive) * rates.cluster
    assert left == pytest.approx(0.6)
    # 50 of 100 tokens are attentive, 45 of these and 15 clusters are left.
    assert counts(Decoupling(), 100, 0.6) == Counts(50, 45, 15, 0)


def test_the_poles():
    assert counts(Decoupling(preset="importance"), 100, 0.6) == Counts(60, 60, 0, 0)
    assert counts(Decoupling(preset="importance", fuse=True), 100, 0.6) == Counts(60, 60, 0, 1)
    assert counts(Decoupling(preset="diversity"), 100, 0.6) == Counts(0, 0, 60, 0)
    assert Decoupling(preset="importance").drops and not Decoupling().drops
    assert Decoupling(preset="diversity").groups_all and not Decoupling().groups_all


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset != "published"])
@pytest.mark.parametrize("keep_rate", [0.9, 0.5, 0.25, 0.05])
def test_a_target_is_hit_wherever_there_is_a_way(preset, keep_rate):
    decoupling = Decoupling(preset=preset)
    for n in (196, 50, 7, 3):
        target = min(max(int(keep_rate * n), 2), n)
        left = counts(decoupling, n, keep_rate, target)
        assert left.total == target
        assert left.matched <= left.attentive <= n
        assert left.clusters <= n - left.attentive
        assert left.attentive - left.matched <= left.attentive // 2


def test_a_count_includes_the_fused_token_and_a_rate_does_not():
    decoupling = Decoupling(fuse=True)
    assert counts(decoupling, 20, 0.5, 10, exact=True).total == 10
    assert counts(decoupling, 20, 0.5, 10, exact=False).total == 11


def test_given_rates_decide_the_counts():
    decoupling = Decoupling(attentive_rate=0.5, match_rate=0.9, cluster_rate=0.3, fuse=True)
    assert decoupling.fixed
    for target in (3, 90):
        assert counts(decoupling, 100, 0.7, target) == Counts(50, 45, 15, 1)


def test_a_table_has_no_rates_on_the_way_to_it():
    published = Decoupling(preset="published", fuse=False)
    assert published.derived() == Decoupling(fuse=False)
    given = Decoupling(cluster_rate=0.3)
    assert given.derived() == given


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "publish"}, "did you mean 'published'"),
        ({"preset": "published", "keep_rate": 0.65}, r"has keep rates 0\.7, .*; got 0\.65"),
        ({"match_rate": 1.5}, r"match_rate must be in \[0, 1\]; got 1\.5"),
        ({"attentive_rate": -0.1}, r"attentive_rate must be in \[0, 1\]; got -0\.1"),
        ({"match_rate": 0.4}, "at most every second attentive token"),
        ({"attentive_merge": "mach"}, "did you mean 'match'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(InputError, match=f"TDM.*{message}"):
        make_reducer("tdm", **settings)
    with pytest.raises(InputError, match=f"EViT with TDM.*{message}"):
        make_reducer("evit+tdm", **settings)


def test_too_few_tokens_for_the_parts():
    reducer = make_reducer("evit+tdm", counts=(2,), layers=(1,))
    with pytest.raises(InputError, match="at least 3 tokens, the last of them fused; got 2"):
        plan(reducer, DEIT)
    with pytest.raises(InputError, match="TDM leaves at least 2 tokens; got 1"):
        plan(make_reducer("tdm", counts=(1,), layers=(1,)), DEIT)
    assert plan(make_reducer("topk", counts=(1,), layers=(1,)), DEIT)[1].out == 1


def test_pairs_cannot_merge_more_than_half():
    reducer = make_reducer("tdm", attentive_rate=0.9, counts=(60,), layers=(1,))
    with pytest.raises(InputError, match="can merge at most 88 of 177 attentive tokens; the rates"):
        plan(reducer, DEIT)
