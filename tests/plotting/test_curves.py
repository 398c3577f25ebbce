"""What becomes of rows: names, numbers and order of lines, and the front."""

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from tdm_jax.analysis.results import Result
from tdm_jax.plotting.curves import AXES, Point, collect, pareto_front


def row(method, keep_rate, top1, **more):
    return Result(method=method, keep_rate=keep_rate, top1_percent=top1, **more)


def test_lines_run_from_left_to_right_and_keep_their_numbers():
    rows = [
        row("none", None, 80.0),
        row("late", 0.9, None),
        row("tdm", 0.5, 78.0),
        row("tdm", 0.7, 79.0),
    ]
    lines, references = collect(rows, AXES["keep_rate"])
    (name, (number, points)), *others = lines.items()
    assert (name, number, others) == ("tdm", 1, [])
    assert [point.x for point in points] == [0.7, 0.5]
    assert [point.y for point in references.values()] == [80]


def test_what_all_rows_share_is_no_part_of_a_name():
    shared = {"model": "small", "training": "fine-tuned"}
    rows = [row("tdm", 0.5, 78.0, **shared), row("topk", 0.5, 77.0, **shared)]
    assert list(collect(rows, AXES["keep_rate"])[0]) == ["tdm", "topk"]
    rows[1] = dataclasses.replace(rows[1], training="")
    assert list(collect(rows, AXES["keep_rate"])[0]) == ["tdm fine-tuned", "topk"]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12),
    st.sampled_from([-1, 1]),
)
def test_the_front_is_what_nobody_beats(pairs, better):
    points = [Point(float(x), float(y)) for x, y in pairs]

    def beats(q, p):
        at_least = q.y >= p.y and better * q.x >= better * p.x
        return at_least and (q.y > p.y or q.x != p.x)

    expected = {p for p in points if not any(beats(q, p) for q in points)}
    front = pareto_front(points, better)
    assert set(front) == expected
    assert len(front) == len(expected)
