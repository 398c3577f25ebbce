"""Tables of results, as the papers print them (Markdown) and in full (CSV, JSON).

A row is a flat mapping. The keys that a table shows are those of its columns (`COLUMNS` unless
told), in base units: scalars, multiply-adds, images per second, percent. A missing value, None and
NaN all mean "not known"; a column of which nothing is known is left out of the Markdown.
"""

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tdm_jax.errors import InputError
from tdm_jax.files import write_text

Row = Mapping[str, Any]

UNKNOWN = "–"


def significant(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, and never with an exponent: 4.60, 0.0153, 1 468."""
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}".replace(",", "\u202f")


def _rate(value: float | Sequence[float]) -> str:
    return "/".join(f"{rate:g}" for rate in np.atleast_1d(value))


class Column(NamedTuple):
    """A column of a table.

    Attributes:
      key: of the row.
      heading: in the Markdown.
      show: how a known value reads.
      spread: key of what stands behind the value: one number (±) or a pair (low to high).
    """

    key: str
    heading: str
    show: Callable[[Any], str] | None
    spread: str = ""


COLUMNS: tuple[Column, ...] = (
    Column("model", "Model", None),
    Column("method", "Method", None),
    Column("keep_rate", "Keep rate", _rate),
    Column("training", "Training", None),
    Column("top1_percent", "Top-1 (%)", lambda v: f"{v:.2f}", "top1_spread"),
    Column("parameters", "Params (M)", lambda v: significant(v / 1e6)),
    Column("macs", "FLOPs (G)", lambda v: significant(v / 1e9)),
    Column("flops_reduction_percent", "FLOPs ↓ (%)", lambda v: f"{v:.1f}"),
    Column("images_per_second", "img/s", significant, "images_per_second_quartiles"),
    Column("speedup", "Speed-up", lambda v: f"{v:.2f}×", "speedup_quartiles"),
    Column("diversity", "Diversity", significant),
    Column("verdict", "Verdict", None),
)


def known(value: Any) -> bool:
    """Whether there is a value at all."""
    if value is None or (isinstance(value, str) and not value):
        return False
    return not (isinstance(value, (float, np.floating)) and math.isnan(value))


def markdown(rows: Sequence[Row], columns: Sequence[Column] = COLUMNS) -> str:
    """A pipe table, its columns aligned in the source too.

    Args:
      rows: see the module's docstring.
      columns: what to show, from left to right.

    Raises:
      InputError: there are no rows.
    """
    _check(rows)
    columns = [c for c in columns if any(known(row.get(c.key)) for row in rows)]
    cells = [[_cell(row, column) for column in columns] for row in rows]
    headings = [column.heading for column in columns]
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    rules = [
        "-" * width if column.show is None else "-" * (width - 1) + ":"
        for column, width in zip(columns, widths, strict=True)
    ]

    def line(values: Sequence[str]) -> str:
        padded = [
            value.ljust(width) if column.show is None else value.rjust(width)
            for value, column, width in zip(values, columns, widths, strict=True)
        ]
        return f"| {' | '.join(padded)} |\n"

    return "".join(line(values) for values in (headings, rules, *cells))


def _cell(row: Row, column: Column) -> str:
    value = row.get(column.key)
    if not known(value):
        return UNKNOWN
    show = column.show or str
    spread = row.get(column.spread) if column.spread else None
    text = show(value)
    if known(spread):
        if np.ndim(spread):
            low, high = spread
            text += f" ({show(low)} to {show(high)})"
        else:
            text += f" ± {show(spread)}"
    return text.replace("|", "\\|").replace("\n", " ")


def to_csv(rows: Sequence[Row]) -> str:
    """Every key of every row, in full precision; lists are joined by slashes.

    Raises:
      InputError: there are no rows.
    """
    _check(rows)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(keys)
    for row in rows:
        values = [_plain(row.get(key)) for key in keys]
        writer.writerow(
            "" if value is None else "/".join(map(str, value)) if isinstance(value, list) else value
            for value in values
        )
    return text.getvalue()


def to_json(rows: Sequence[Row], about: Mapping[str, Any] | None = None) -> str:
    """`{"about": ..., "rows": [...]}`, with null for what is not known.

    Raises:
      InputError: there are no rows.
    """
    _check(rows)
    document = {"about": _plain(about or {}), "rows": [_plain(row) for row in rows]}
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """The same in types that CSV and JSON have."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write(
    rows: Sequence[Row],
    stem: str | Path,
    about: Mapping[str, Any] | None = None,
    *,
    columns: Sequence[Column] = COLUMNS,
    remark: str = "",
) -> None:
    """Writes `<stem>.md`, `<stem>.csv` and `<stem>.json`, each whole or not at all.

    Args:
      rows: see the module's docstring.
      stem: path without a suffix.
      about: what else should be kept with the rows, e.g. the machine; into the JSON only.
      columns: of the Markdown.
      remark: a line to stand below the Markdown.

    Raises:
      InputError: there are no rows, or nothing can be written there.
    """
    below = f"\n{remark}\n" if remark else ""
    texts = {
        ".md": markdown(rows, columns) + below,
        ".csv": to_csv(rows),
        ".json": to_json(rows, about),
    }
    for suffix, text in texts.items():
        write_text(f"{stem}{suffix}", text)


def check_folder(output: str | Path) -> None:
    """Refuses, before long work, an `--output` that can be no folder."""
    if Path(output).exists() and not Path(output).is_dir():
        raise InputError(f"--output: expected a folder; got the file {output}")


def _check(rows: Sequence[Row]) -> None:
    if not rows:
        raise InputError("table: expected at least one row; got none")
