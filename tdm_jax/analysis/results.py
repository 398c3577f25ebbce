"""Results, one typed row each, and tables of them: as papers print them (Markdown), and in full.

Values are in base units: scalars, multiply-adds, images per second, seconds, bytes, percent. None
and NaN mean "not known"; a column of which nothing is known is left out of the Markdown.
"""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tdm_jax.errors import InputError
from tdm_jax.files import write_text

UNKNOWN = "–"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What is known of one candidate.

    Attributes:
      model, method, keep_rate, training: who it is, see `candidate.Candidate`.
      mode, dtype, batch_size: what was measured.
      top1_percent: accuracy, beside its 95% interval over images; with several trainings their
        mean, beside the standard deviation `top1_spread`, and `top1_each`.
      over_unreduced, over_random: its difference, in points, from the unreduced model's and from
        that of random dropping at the same cost, on the same images, with 95% intervals.
      knn_percent, penalty: of a probe of frozen features, see `probe`.
      patches_percent, patches_over_unreduced, miou_percent: of a classifier of patches, see
        `dense`.
      within_noise: from which of them it may be no difference.
      top5_percent, loss, examples: accuracy, cross entropy, and how many images they are over.
      agreement_percent, cosine, error, dense_cosine, dense_error: how true the model stays to the
        unreduced one, see `fidelity`, with 95% intervals over images (the last four's half widths).
      description: the method as every command takes it.
      tile, layers, counts: of a schedule of token counts, and which tile its sequences fill.
      parameters, macs: scalars, and multiply-adds for one image ("FLOPs" in the papers).
      flops_reduction_percent, flops_ratio: share of the unreduced model's multiply-adds that is
        saved, and how many times its own they are.
      tokens, tokens_per_block: patch tokens that leave each block.
      evaluated_images_per_second: of an evaluation, reading and decoding included.
      road_images_per_second, device_images_per_second, device_busy, device_transfers, host_data,
        host_answers: where its time went, see `parallel.overlap.Road`.
      operations, bytes, intensity, bound: what a forward pass computes and moves for one image,
        their quotient, and which of the two bounds it.
      cycles: of a forward pass, by a compiler's estimate, which part of them is `attention_cycles`,
        `mlp_cycles`, `stage_cycles`, and what it has no price for (`unpriced` operations).
      temporary_bytes: what a forward pass needs besides weights and images.
      latency_seconds: of one call; here and below medians, beside lower and upper quartiles.
      images_per_second, speedup: the latter over the unreduced model in the same rounds.
      reduction_share: part of the time that goes into choosing and merging.
      flops_per_second, memory_bytes, compile_seconds: of the program.
      matmul_share: of that rate, over a large product's in the same rounds.
      diversity, diversity_per_block: r(Z) of the tokens that leave one block, and each.
      cosine_per_block, dense_cosine_per_block: fidelity behind each block.
      block: from 1, of a row that is about one.
      verdict: whether the method is worth it, by its measured speed.
    """

    model: str = ""
    method: str = ""
    keep_rate: float | tuple[float, ...] | None = None
    training: str = ""
    mode: str | None = None
    dtype: str | None = None
    batch_size: int | None = None
    top1_percent: float | None = None
    top1_interval: tuple[float, float] | None = None
    over_unreduced: float | None = None
    over_unreduced_interval: tuple[float, float] | None = None
    over_random: float | None = None
    over_random_interval: tuple[float, float] | None = None
    within_noise: str | None = None
    knn_percent: float | None = None
    knn_interval: tuple[float, float] | None = None
    penalty: float | None = None
    patches_percent: float | None = None
    patches_interval: float | None = None
    patches_over_unreduced: float | None = None
    patches_over_unreduced_interval: float | None = None
    miou_percent: float | None = None
    top1_spread: float | None = None
    top1_each: tuple[float, ...] | None = None
    top5_percent: float | None = None
    loss: float | None = None
    examples: int | None = None
    agreement_percent: float | None = None
    agreement_percent_interval: tuple[float, float] | None = None
    cosine: float | None = None
    cosine_interval: float | None = None
    error: float | None = None
    error_interval: float | None = None
    dense_cosine: float | None = None
    dense_cosine_interval: float | None = None
    dense_error: float | None = None
    dense_error_interval: float | None = None
    description: str | None = None
    tile: int | None = None
    layers: tuple[int, ...] | None = None
    counts: tuple[int, ...] | None = None
    parameters: int | None = None
    macs: int | None = None
    flops_reduction_percent: float | None = None
    flops_ratio: float | None = None
    tokens: tuple[int, ...] | None = None
    tokens_per_block: tuple[int, ...] | None = None
    evaluated_images_per_second: float | None = None
    road_images_per_second: float | None = None
    device_images_per_second: float | None = None
    device_busy: float | None = None
    device_transfers: float | None = None
    host_data: float | None = None
    host_answers: float | None = None
    operations: int | None = None
    bytes: float | None = None
    intensity: float | None = None
    bound: str | None = None
    cycles: int | None = None
    attention_cycles: int | None = None
    mlp_cycles: int | None = None
    stage_cycles: int | None = None
    unpriced: int | None = None
    temporary_bytes: int | None = None
    latency_seconds: float | None = None
    latency_quartiles: tuple[float, float] | None = None
    images_per_second: float | None = None
    images_per_second_quartiles: tuple[float, float] | None = None
    speedup: float | None = None
    speedup_quartiles: tuple[float, float] | None = None
    reduction_share: float | None = None
    flops_per_second: float | None = None
    matmul_share: float | None = None
    memory_bytes: int | None = None
    compile_seconds: float | None = None
    diversity: float | None = None
    diversity_per_block: tuple[float, ...] | None = None
    cosine_per_block: tuple[float, ...] | None = None
    dense_cosine_per_block: tuple[float, ...] | None = None
    block: int | None = None
    verdict: str | None = None


KEYS = tuple(field.name for field in dataclasses.fields(Result))


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
      key: field of `Result`.
      heading: of the column.
      show: how a known value reads; None for words, which stand at the left.
      spread: field of what stands behind the value: one number (±) or a pair (low to high).
    """

    key: str
    heading: str
    show: Callable[[Any], str] | None = None
    spread: str = ""

    def cell(self, row: Result) -> tuple[str, str]:
        """The value as it reads, and its spread, "" without one."""
        value = getattr(row, self.key)
        if not known(value):
            return UNKNOWN, ""
        show = self.show or str
        spread: Any = getattr(row, self.spread) if self.spread else None
        if not known(spread):
            return show(value), ""
        ends = [show(end) for end in np.atleast_1d(spread)]
        return show(value), f"± {ends[0].lstrip('+')}" if len(ends) == 1 else " to ".join(ends)


# What several tables show.
COLUMNS: dict[str, Column] = {
    column.key: column
    for column in (
        Column("model", "Model"),
        Column("method", "Method"),
        Column("keep_rate", "Keep rate", _rate),
        Column("training", "Training"),
        Column("dtype", "Type"),
        Column("batch_size", "Batch", str),
        Column("top1_percent", "Top-1 (%)", lambda v: f"{v:.2f}", "top1_interval"),
        Column("top1_spread", "SD of trainings", lambda v: f"{v:.2f}"),
        Column("over_unreduced", "Over none", lambda v: f"{v:+.2f}", "over_unreduced_interval"),
        Column("over_random", "Over random", lambda v: f"{v:+.2f}", "over_random_interval"),
        Column("within_noise", "Within noise of"),
        Column("knn_percent", "k-NN (%)", lambda v: f"{v:.2f}", "knn_interval"),
        Column("patches_percent", "Patches (%)", lambda v: f"{v:.2f}", "patches_interval"),
        Column(
            "patches_over_unreduced",
            "Over none",
            lambda v: f"{v:+.2f}",
            "patches_over_unreduced_interval",
        ),
        Column("miou_percent", "mIoU (%)", lambda v: f"{v:.2f}"),
        Column("penalty", "Penalty", lambda v: f"{v:.1e}"),
        Column("top5_percent", "Top-5 (%)", lambda v: f"{v:.2f}"),
        Column("loss", "Loss", lambda v: f"{v:.4f}"),
        Column(
            "agreement_percent", "Agreement (%)", lambda v: f"{v:.1f}", "agreement_percent_interval"
        ),
        Column("cosine", "Cosine", lambda v: f"{v:.4f}", "cosine_interval"),
        Column("error", "Error", lambda v: f"{v:.3f}", "error_interval"),
        Column("dense_cosine", "Dense cosine", lambda v: f"{v:.4f}", "dense_cosine_interval"),
        Column("dense_error", "Dense error", lambda v: f"{v:.3f}", "dense_error_interval"),
        Column("description", "Description"),
        Column("examples", "Examples", lambda v: f"{v:,}"),
        Column("parameters", "Params (M)", lambda v: significant(v / 1e6)),
        Column("macs", "FLOPs (G)", lambda v: significant(v / 1e9)),
        Column("flops_reduction_percent", "FLOPs ↓ (%)", lambda v: f"{v:.1f}"),
        Column("images_per_second", "img/s", significant, "images_per_second_quartiles"),
        Column("speedup", "Speed-up", lambda v: f"{v:.2f}×", "speedup_quartiles"),
        Column("diversity", "Diversity", significant),
        Column("verdict", "Verdict"),
    )
}
COMPARISON = (
    *("model", "method", "keep_rate", "training", "top1_percent", "top1_spread"),
    *("over_unreduced", "over_random", "within_noise"),
    *("agreement_percent", "cosine", "dense_cosine", "parameters", "macs"),
    *("flops_reduction_percent", "images_per_second", "speedup", "diversity", "verdict"),
)


def known(value: Any) -> bool:
    """Whether there is a value at all."""
    if value is None or (isinstance(value, str) and not value):
        return False
    return not (isinstance(value, float) and math.isnan(value))


def shown(rows: Sequence[Result], columns: Sequence[str | Column]) -> list[Column]:
    """Those columns of which something is known; a name stands for one of `COLUMNS`."""
    every = [COLUMNS[column] if isinstance(column, str) else column for column in columns]
    return [column for column in every if any(known(getattr(row, column.key)) for row in rows)]


def markdown(rows: Sequence[Result], columns: Sequence[str | Column] = COMPARISON) -> str:
    """A pipe table of what is known, see `shown`; its columns stand from left to right."""
    columns = shown(rows, columns)

    def text(row: Result, column: Column) -> str:
        value, spread = column.cell(row)
        if spread:
            value += f" {spread}" if spread[0] == "±" else f" ({spread})"
        return value.replace("|", "\\|").replace("\n", " ")

    cells = [[text(row, column) for column in columns] for row in rows]
    return pipe_table({column.heading: column.show is not None for column in columns}, cells)


def pipe_table(headings: Mapping[str, bool], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, aligned in the source too.

    `headings` say of each column whether it holds numbers, which stand at the right.
    """
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    sides = [">" if numbers else "<" for numbers in headings.values()]
    rules = ["-" * (width - (side == ">")) for side, width in zip(sides, widths, strict=True)]
    rules = [rule + ":" * (side == ">") for side, rule in zip(sides, rules, strict=True)]

    def line(values: Sequence[str]) -> str:
        cells = zip(values, sides, widths, strict=True)
        return f"| {' | '.join(f'{value:{side}{width}}' for value, side, width in cells)} |\n"

    return "".join(line(values) for values in (tuple(headings), rules, *rows))


def records(rows: Sequence[Result]) -> list[dict[str, Any]]:
    """The rows as JSON can hold them: each with every key of which something is known.

    `keep_rate` is always there, and in a comparison `training` and `top1_percent`.
    """
    kept = {key for key in KEYS if any(known(getattr(row, key)) for row in rows)} | {"keep_rate"}
    if "flops_reduction_percent" in kept:
        kept |= {"training", "top1_percent"}
    return [{key: _plain(getattr(row, key)) for key in KEYS if key in kept} for row in rows]


def to_csv(rows: Sequence[Result]) -> str:
    """Every value of every row, in full precision; lists are joined by slashes."""
    values = records(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(values[0]), lineterminator="\n")
    writer.writeheader()
    for row in values:
        writer.writerow(
            {k: "/".join(map(str, v)) if isinstance(v, list) else v for k, v in row.items()}
        )
    return text.getvalue()


def to_json(rows: Sequence[Result], about: Mapping[str, Any] | None = None) -> str:
    """`{"about": ..., "rows": [...]}`, with null for what is not known."""
    document = {"about": _plain(about or {}), "rows": records(rows)}
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: str | Path) -> list[Result]:
    """The rows of what `to_json` wrote.

    Raises:
      InputError: there is no such table.
    """
    try:
        rows: list[dict[str, Any]] = json.loads(Path(path).read_text(encoding="utf-8"))["rows"]
        for row in rows:
            row.update({k: tuple(v) for k, v in row.items() if isinstance(v, list)})
        return [Result(**row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: expected a table's JSON; got {error!r}") from error


def _plain(value: Any) -> Any:
    """The same in types that CSV and JSON have."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(
    rows: Sequence[Result],
    stem: str | Path,
    about: Mapping[str, Any] | None = None,
    *,
    columns: Sequence[str | Column] = COMPARISON,
    remark: str = "",
) -> None:
    """Writes `<stem>.md`, `<stem>.csv` and `<stem>.json`, each whole or not at all.

    Args:
      rows: at least one.
      stem: path without a suffix.
      about: what else should be kept with the rows, e.g. the machine; into the JSON only.
      columns: of the Markdown, see `markdown`.
      remark: a line to stand below the Markdown.

    Raises:
      InputError: there are no rows, or nothing can be written there.
    """
    if not rows:
        raise InputError("table: expected at least one row; got none")
    table = markdown(rows, columns) + (f"\n{remark}\n" if remark else "")
    for suffix, text in ((".md", table), (".csv", to_csv(rows)), (".json", to_json(rows, about))):
        write_text(f"{stem}{suffix}", text)
