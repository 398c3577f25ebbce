import csv
import dataclasses
import io
import json
import math

import pytest

from tdm_jax.analysis import results
from tdm_jax.analysis.results import Result
from tdm_jax.errors import InputError

ROWS = [
    Result(
        model="deit_small",
        method="none",
        top1_percent=79.8,
        parameters=22_050_664,
        macs=4_603_567_752,
        flops_reduction_percent=0.0,
        images_per_second=943.4,
        speedup=1.0,
    ),
    Result(
        model="deit_small",
        method="a|b",
        keep_rate=(0.7, 0.5, 0.5),
        top1_percent=79.25,
        top1_interval=(78.85, 79.65),
        top1_spread=0.4,
        over_unreduced=-0.55,
        over_unreduced_interval=(-1.0, 0.1),
        within_noise="unreduced",
        parameters=22_050_664,
        macs=3_004_791_637,
        flops_reduction_percent=34.73,
        images_per_second=1468.0,
        images_per_second_quartiles=(1450.2, 1480.0),
        speedup=math.nan,
    ),
]


def cells(line):
    return [cell.strip() for cell in line.strip("|\n").replace("\\|", "\0").split("|")]


def test_markdown_reads_as_the_papers_tables():
    heading, rule, plain, reduced = results.markdown(ROWS).splitlines()
    assert cells(heading) == [
        "Model",
        "Method",
        "Keep rate",
        "Top-1 (%)",
        "SD of trainings",
        "Over none",
        "Within noise of",
        "Params (M)",
        "FLOPs (G)",
        "FLOPs ↓ (%)",
        "img/s",
        "Speed-up",
    ]
    assert cells(plain) == [
        "deit_small",
        "none",
        "–",
        "79.80",
        *"–––",
        "22.1",
        "4.60",
        "0.0",
        "943",
        "1.00×",
    ]
    assert cells(reduced) == [
        "deit_small",
        "a\0b",
        "0.7/0.5/0.5",
        "79.25 (78.85 to 79.65)",
        "0.40",
        "-0.55 (-1.00 to +0.10)",
        "unreduced",
        "22.1",
        "3.00",
        "34.7",
        "1\u202f468 (1\u202f450 to 1\u202f480)",
        "–",
    ]
    assert [cell.endswith(":") for cell in cells(rule)] == [False] * 2 + [True] * 4 + [False] + [
        True
    ] * 5


def test_source_is_aligned_and_no_cell_breaks_the_table():
    text = results.markdown([*ROWS, Result(method="two\nlines")])
    assert len({len(line) for line in text.splitlines()}) == 1
    assert len(text.splitlines()) == 5


def test_columns_of_which_nothing_is_known_are_left_out():
    heading = results.markdown([Result(method="none", speedup=math.nan)])
    assert cells(heading.splitlines()[0]) == ["Method"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(4.6035, "4.60"), (0.0153218, "0.0153"), (86.57, "86.6"), (12345.6, "12\u202f346"), (0, "0")],
)
def test_significant_digits(value, text):
    assert results.significant(value) == text


def test_csv_has_everything_in_full_precision():
    first, second = csv.DictReader(io.StringIO(results.to_csv(ROWS)))
    assert first["macs"] == "4603567752"
    assert first["keep_rate"] == ""
    assert second["method"] == "a|b"
    assert second["keep_rate"] == "0.7/0.5/0.5"
    assert second["images_per_second_quartiles"] == "1450.2/1480.0"
    assert second["speedup"] == ""
    assert first["top1_spread"] == ""


def test_json_has_null_for_what_is_not_known():
    document = json.loads(results.to_json(ROWS, {"device": "cpu"}))
    assert document["about"] == {"device": "cpu"}
    assert document["rows"][1]["speedup"] is None
    assert document["rows"][1]["parameters"] == 22050664
    assert document["rows"][1]["keep_rate"] == [0.7, 0.5, 0.5]


def test_write_makes_three_files(tmp_path):
    results.write(ROWS, tmp_path / "out" / "deit.v1")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"deit.v1.md", "deit.v1.csv", "deit.v1.json"}


def test_a_table_of_other_columns_with_a_remark(tmp_path):
    columns = (results.Column("macs", "Multiply-adds", "{:,}".format),)
    results.write(ROWS, tmp_path / "costs", columns=columns, remark="For one image.")
    lines = (tmp_path / "costs.md").read_text().splitlines()
    assert cells(lines[0]) == ["Multiply-adds"]
    assert cells(lines[2]) == ["4,603,567,752"]
    assert lines[-2:] == ["", "For one image."]


def test_json_comes_back_as_rows(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(results.to_json(ROWS))
    first, second = results.read_json(path)
    assert first == ROWS[0]
    # What was not known is None, whatever it was before.
    assert second == dataclasses.replace(ROWS[1], speedup=None)


def test_a_comparison_without_accuracies_has_their_keys_and_no_others():
    bare = Result(model="m", method="tdm", parameters=1, macs=2, flops_reduction_percent=3.0)
    (row,) = results.records([bare])
    assert list(row) == [
        *("model", "method", "keep_rate", "training", "top1_percent"),
        *("parameters", "macs", "flops_reduction_percent"),
    ]
    assert row["keep_rate"] is row["top1_percent"] is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected a table's JSON"),
        ('{"table": []}', "expected a table's JSON"),
        ('{"rows": [{"top1": 3}]}', "unexpected keyword argument 'top1'"),
    ],
)
def test_what_is_no_table_is_one_line(text, message, tmp_path):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        results.read_json(path)


def test_no_rows_is_one_line_and_writes_nothing(tmp_path):
    with pytest.raises(InputError, match="expected at least one row"):
        results.write([], tmp_path / "table")
    assert not list(tmp_path.iterdir())
