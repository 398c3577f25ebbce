import math

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tdm_jax.analysis.results import Result
from tdm_jax.errors import InputError
from tdm_jax.plotting import plots
from tdm_jax.plotting.plots import plot, save, spread_out


def row(method, keep_rate, top1, macs=None, speed=None, **more):
    return Result(
        method=method,
        keep_rate=keep_rate,
        top1_percent=top1,
        macs=macs,
        images_per_second=speed,
        **more,
    )


ROWS = [
    row("none", None, 79.8, 4_600_000_000, 900.0, diversity=9.0),
    row(
        "tdm",
        0.5,
        79.0,
        2_300_000_000,
        1800.0,
        diversity=5.0,
        images_per_second_quartiles=(1700.0, 1850.0),
    ),
    row("tdm", 0.7, 79.6, 3_000_000_000, 1400.0, diversity=7.0, top1_interval=(79.3, 80.0)),
    row("random", 0.5, 77.0, 2_400_000_000, 1900.0, diversity=6.0),
    row("random", 0.7, math.nan, 3_000_000_000, 1500.0),
]


def lines(figure):
    """Data of the drawn lines and single points, by their size."""
    return [line.get_xydata() for line in figure.axes[0].lines]


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_a_line_for_each_method_and_a_level_for_the_reference():
    figure = plot(ROWS, "keep_rate", title="digits")
    tdm, random = (c.lines[0].get_xydata() for c in figure.axes[0].containers)
    np.testing.assert_allclose(tdm, [[0.7, 79.6], [0.5, 79.0]])
    np.testing.assert_allclose(random, [[0.5, 77.0]])
    assert any((np.asarray(line)[:, 1] == 79.8).all() for line in lines(figure))
    assert texts(figure) == ["tdm", "random", "none 79.8"]
    left, right = figure.axes[0].get_xlim()
    assert left > right
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["0.5", "0.7"]


def test_costs_have_their_unit_and_a_front_with_keep_rates():
    figure = plot(ROWS, "flops")
    tdm = figure.axes[0].containers[0].lines[0].get_xydata()
    np.testing.assert_allclose(tdm, [[3.0, 79.6], [2.3, 79.0]])
    front = next(line for line in figure.axes[0].lines if "Pareto" in str(line.get_label()))
    np.testing.assert_allclose(front.get_xydata(), [[2.3, 79.0], [3.0, 79.6], [4.6, 79.8]])
    assert {"0.5", "0.7"} <= set(texts(figure))


def test_error_bars_have_the_ends_they_are_given():
    tdm = plot(ROWS, "throughput").axes[0].containers[0]
    assert tdm.has_xerr
    assert tdm.has_yerr
    across, along = (bars.get_segments() for bars in tdm.lines[2])
    np.testing.assert_allclose(across[1][:, 0], [1700, 1850])
    np.testing.assert_allclose(along[0][:, 1], [79.3, 80.0])
    assert not plot(ROWS, "diversity").axes[0].containers[1].has_xerr


def test_a_method_looks_the_same_on_every_plot():
    first = plot([*ROWS, row("late", 0.5, 70.0)], "keep_rate")
    second = plot([row("late", 0.5, 70.0), row("tdm", 0.5, 79.0, 2_300_000_000)], "flops")
    names = ["late", "tdm"]
    colors = {
        name: next(t for t in first.axes[0].texts if t.get_text() == name).get_color()
        for name in names
    }
    assert colors["late"] != colors["tdm"]
    # "late" has no FLOPs, but still the first look is its own.
    tdm = next(t for t in second.axes[0].texts if t.get_text() == "tdm")
    assert tdm.get_color() == plots.Look.of(1).label_color


def test_long_names_leave_the_lines_room(tmp_path):
    figure = plot([row("a" * 200 + "z", 0.5, 79.0)], "keep_rate", size=(4.8, 3.6))
    save(figure, tmp_path / "plot.svg")
    assert texts(figure) == ["a" * 12 + "…" + "a" * 11 + "z"]
    assert figure.axes[0].get_position().width > 0.3


def test_models_and_trainings_are_told_apart():
    rows = [
        row("tdm", 0.5, 79.0, model="small", training="fine-tuned"),
        row("tdm", 0.5, 72.0, model="tiny"),
    ]
    assert texts(plot(rows, "keep_rate")) == ["small tdm fine-tuned", "tiny tdm"]


def test_one_keep_rate_a_stage_stands_at_their_mean():
    figure = plot([row("tdm", (0.7, 0.6, 0.5), 79.0)], "keep_rate")
    np.testing.assert_allclose(figure.axes[0].containers[0].lines[0].get_xydata(), [[0.6, 79.0]])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=15))
def test_labels_keep_their_order_their_distance_and_their_place(heights):
    placed = spread_out(heights, 0.06)
    order = sorted(range(len(heights)), key=lambda i: (heights[i], i))
    steps = np.diff([placed[i] for i in order])
    assert (steps >= 0.06 - 1e-9).all()
    assert min(placed) >= 0
    assert max(placed) <= 1 + 1e-9


def test_labels_with_room_stay_where_they_are():
    np.testing.assert_allclose(spread_out([0.9, 0.1, 0.5], 0.06), [0.9, 0.1, 0.5])


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_files_are_the_same_twice(tmp_path, suffix):
    for name in "ab":
        save(plot(ROWS, "throughput", title="t"), tmp_path / f"{name}{suffix}")
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2
    if suffix == ".png":
        with Image.open(tmp_path / "a.png") as image:
            assert image.size == (1440, 880)


def test_labels_are_text_and_not_mathematics(tmp_path):
    save(plot([row("$a_b<c>$", 0.5, 1.0)], "keep_rate", title="$x$"), tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert "$a_b&lt;c&gt;$" in text
    assert "$x$" in text


def test_state_of_matplotlib_is_left_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    save(plot(ROWS, "flops"), tmp_path / "a.svg")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("rows", "against", "message"),
    [
        (ROWS, "flopps", "did you mean 'flops'"),
        ([], "flops", "expected rows with top1_percent and macs; got none"),
        ([row("tdm", 0.5, None, 2_300_000_000)], "flops", "got none"),
    ],
)
def test_what_cannot_be_plotted_is_one_line(rows, against, message):
    with pytest.raises(InputError, match=message):
        plot(rows, against)


def test_a_wrong_suffix_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"ends in .png or .svg"):
        save(plot(ROWS, "flops"), tmp_path / "plot.gif")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"tdm_jax\[viz\]"):
        plot(ROWS, "flops")
