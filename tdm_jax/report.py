"""One page that shows everything: `python -m tdm_jax.report --models=... --data=... --output=...`.

    python -m tdm_jax.report --models=runs/digits --methods=random,evit,tdm \
        --keep_rates=0.9,0.7,0.5,0.3 --layers=2,3,5 --data=digits --output=report.html

The page holds the comparison as a table, the plots, and an explorer: pick an image, a method and a
stage, move the keep rate, and see which patches are kept, grouped, matched and dropped, and what
the model then says. It is one file without a reference to another, so it opens from a disk.
"""

import base64
import html
import io
import json
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Int, UInt8
from PIL import Image

from tdm_jax import data
from tdm_jax.analysis import candidate, environment, results
from tdm_jax.analysis.candidate import Candidate, with_baselines
from tdm_jax.analysis.results import Column
from tdm_jax.analysis.timing import Timing
from tdm_jax.cli import start
from tdm_jax.compare import compare
from tdm_jax.data import DataConfig, transforms
from tdm_jax.data.device_transforms import normalise
from tdm_jax.data.images import CorruptImage, open_image
from tdm_jax.errors import InputError
from tdm_jax.files import write_text
from tdm_jax.models.vit import Info
from tdm_jax.plotting import colors, curves, plots
from tdm_jax.plotting.patch_maps import DROPPED, SourceMap, as_rgb
from tdm_jax.reduction.token_state import TokenKind

_PLOTS = {
    "keep_rate": "Top-1 accuracy against keep rate",
    "flops": "Top-1 accuracy against multiply-adds per image",
    "throughput": "Top-1 accuracy against throughput",
    "diversity": "Top-1 accuracy against diversity",
}
_PLOT_SIZE = (4.8, 3.6)  # legible at a phone's width
_TOP = 3


def write_report(
    path: str | Path,
    entries: Sequence[Candidate],
    records: Sequence[Mapping[str, Any]],
    source: DataConfig,
    *,
    images: int = 8,
    title: str = "Token reduction, compared",
    remark: str = "",
) -> None:
    """Writes the page, whole or not at all.

    Args:
      path: of the file.
      entries: who is in the explorer, with weights; contenders of one transformer.
      records: rows of the table and the plots, see `tables`.
      source: the data that the explorer's images are from.
      images: how many of them, spread evenly over the validation split.
      title: of the page.
      remark: a line below the table, e.g. the machine.

    Raises:
      InputError: the entries have no weights, are of several transformers, or nothing can be
        written.
    """
    names = sorted({entry.name for entry in entries})
    if len(names) != 1:
        raise InputError(f"a report shows one model; got {', '.join(names) or 'none'}")
    if any(entry.params is None for entry in entries):
        raise InputError(f"{names[0]} is a name without weights; expected a checkpoint")
    pixels, labels = _pick(source, images)
    document = explorer(with_baselines(entries), pixels, labels, source)
    page = resources.files("tdm_jax").joinpath("report.html").read_text(encoding="utf-8")
    parts = {
        "title": html.escape(title),
        "table": html_table(records),
        "remark": html.escape(remark),
        "plots": "\n".join(_figures(records)),
        # No label may end the script that it stands in.
        "data": json.dumps(document, separators=(",", ":")).replace("<", "\\u003c"),
    }
    write_text(path, re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], page))


def html_table(
    records: Sequence[Mapping[str, Any]], columns: Sequence[Column] = results.COLUMNS
) -> str:
    """The rows as an HTML table, every cell escaped; a model that all share is its caption."""
    shown = [c for c in columns if any(results.known(row.get(c.key)) for row in records)]
    models = {row.get("model") for row in records}
    caption = ""
    if len(models) == 1 and results.known(model := models.pop()):
        shown = [c for c in shown if c.key != "model"]
        caption = f"<caption>{html.escape(model)}</caption>"

    def cell(row: Mapping[str, Any], column: Column) -> str:
        value = row.get(column.key)
        text = (column.show or str)(value) if results.known(value) else results.UNKNOWN
        spread = row.get(column.spread) if column.spread else None
        if results.known(spread) and column.show is not None:
            ends = [column.show(end) for end in np.atleast_1d(spread)]
            small = f"± {ends[0]}" if len(ends) == 1 else f"{ends[0]} to {ends[1]}"
            text = f"{html.escape(text)} <small>{html.escape(small)}</small>"
        else:
            text = html.escape(text)
        kind = "text" if column.show is None else "number"
        return f'<td class="{kind}">{text}</td>'

    kinds = ["text" if column.show is None else "number" for column in shown]
    head = "".join(
        f'<th scope="col" class="{kind}">{html.escape(column.heading)}</th>'
        for kind, column in zip(kinds, shown, strict=True)
    )
    body = "\n".join(f"<tr>{''.join(cell(row, c) for c in shown)}</tr>" for row in records)
    return f"{caption}<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>"


def _figures(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each plot that the rows suffice for, as inline SVG."""
    found = []
    for axis, name in _PLOTS.items():
        key = curves.AXES[axis].key
        enough = [r for r in records if all(results.known(r.get(k)) for k in (key, "top1_percent"))]
        if not enough:
            continue
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "plot.svg"
            plots.save(plots.plot(records, axis, size=_PLOT_SIZE), file)
            text = file.read_text(encoding="utf-8")
        drawing = text[text.index("<svg") :]
        drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
        # Names of one drawing must not be taken for another's.
        drawing = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{axis}-", drawing)
        label = f'<svg role="img" aria-label="{html.escape(name)}"'
        found.append(
            f"<figure>{drawing.replace('<svg', label, 1)}<figcaption>{name}</figcaption></figure>"
        )
    return found


def _pick(source: DataConfig, count: int) -> tuple[UInt8[np.ndarray, "b h w c"], list[int]]:
    """Images spread over the validation split, as a model sees them, and their labels."""
    split = data.open_source(source, "validation")
    transform = transforms.EvalTransform(source)
    pixels, labels = [], []
    for index in np.linspace(0, len(split) - 1, min(count, len(split))).astype(int):
        record = split[int(index)]
        try:
            pixels.append(transform(open_image(record["image"])))
        except (CorruptImage, OSError):
            continue
        labels.append(int(record["label"]))
    if not pixels:
        raise InputError(f"no image of {source.name} could be read; expected at least one")
    return np.stack(pixels), labels


def explorer(
    entries: Sequence[Candidate],
    pixels: UInt8[np.ndarray, "b h w c"],
    labels: Sequence[int],
    source: DataConfig,
) -> dict[str, Any]:
    """What the explorer shows, as JSON can hold it.

    Args:
      entries: the unreduced model first.
      pixels: images as the models see them, before normalisation.
      labels: their classes.
      source: names the classes, and says how images are normalised.
    """
    names = data.class_names(source)
    model = entries[0].model
    classes = [str(i) if names is None else names[i] for i in range(model.num_classes)]
    images = normalise(jnp.asarray(pixels), source.mean, source.std)
    methods: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        run = jax.jit(lambda p, x, model=entry.model: model.apply(p, x, return_info=True))
        logits, info = run(entry.params, images)
        shares = jax.device_get(jax.nn.softmax(logits, axis=-1))
        rate = entry.label.removeprefix(entry.method).removesuffix(entry.training).strip()
        method = f"{entry.method}, {entry.training}" if entry.training else entry.method
        methods.setdefault(method, []).append(
            {
                "rate": rate,
                "order": float(np.mean(entry.keep_rate)) if entry.keep_rate is not None else 1.0,
                "stages": [stage.layer + 1 for stage in info.stages],
                "images": [_seen(info, shares[i], i, model.shape.grid) for i in range(len(labels))],
            }
        )
    return {
        "grid": list(model.shape.grid),
        "size": list(pixels.shape[1:3]),
        "classes": {str(i): classes[i] for i in _mentioned(methods, labels)},
        "colours": [colors.hex_code(shade.rgb) for shade in colors.SHADES],
        "images": [
            {"url": _url(image), "label": label}
            for image, label in zip(pixels, labels, strict=True)
        ],
        "methods": [
            {"name": name, "runs": sorted(runs, key=lambda run: -run["order"])}
            for name, runs in methods.items()
        ],
    }


def _mentioned(methods: Mapping[str, list[dict[str, Any]]], labels: Sequence[int]) -> list[int]:
    says = {
        name
        for runs in methods.values()
        for run in runs
        for image in run["images"]
        for name, _ in image["says"]
    }
    return sorted(says | set(labels))


def _seen(info: Info, shares: np.ndarray, index: int, grid: tuple[int, int]) -> dict[str, Any]:
    best = np.argsort(-shares, kind="stable")[:_TOP]
    return {
        "says": [[int(i), round(float(shares[i]), 4)] for i in best],
        "stages": [_stage(SourceMap.of(stage, index, grid)) for stage in info.stages],
    }


def _stage(source: SourceMap) -> dict[str, Any]:
    """One source map: each patch's token and kind, and a colour for each group."""
    kinds = source.patch_kind
    coloured = np.isin(kinds, (TokenKind.MATCHED, TokenKind.CLUSTER, TokenKind.FUSED))
    tokens, places = np.unique(source.assign[coloured], return_inverse=True)
    labels = np.full(len(kinds), -1)
    labels[coloured] = places
    shades = colors.share_out(colors.neighbours(labels.reshape(source.grid), len(tokens)))
    colour = np.full(len(kinds), -1)
    if shades:
        number = np.array([colors.SHADES.index(shade) for shade in shades])
        colour[coloured] = number[places]
    letters = {
        TokenKind.KEPT: "k",
        TokenKind.MATCHED: "m",
        TokenKind.CLUSTER: "c",
        TokenKind.FUSED: "c",
        DROPPED: "d",
    }
    return {
        "tokens": source.tokens,
        "token": _packed(source.assign),
        "kind": "".join(letters[int(kind)] for kind in kinds),
        "colour": _packed(colour),
    }


def _packed(numbers: Int[np.ndarray, " p"]) -> str:
    """Little-endian 16-bit integers in base 64."""
    return base64.b64encode(numbers.astype("<i2").tobytes()).decode()


def _url(image: UInt8[np.ndarray, "h w c"]) -> str:
    file = io.BytesIO()
    kind = "png" if image.shape[1] <= 64 else "jpeg"
    Image.fromarray(np.ascontiguousarray(as_rgb(image))).save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def define_flags() -> None:
    """The command's flags; not at import, so that programs may import several commands."""
    candidate.define_flags()
    candidate.define_data_flags()
    flags.DEFINE_string("rows", "", "comparison.json or sweep.json for table and plots; else made.")
    flags.DEFINE_bool("measure", False, "Measure the speed, beside the unreduced model.")
    flags.DEFINE_integer("batch_size", 32, "Images per call where speed is measured.", 1)
    flags.DEFINE_integer("images", 8, "Images in the explorer.", 1)
    flags.DEFINE_string("title", "Token reduction, compared", "Of the page.")
    flags.DEFINE_string("output", "report.html", "The page.")


def main() -> None:
    """The command."""
    given = flags.FLAGS
    if Path(given.output).is_dir():
        raise InputError(f"--output: expected a file's name; got the folder {given.output}")
    entries = candidate.from_flags()
    source = candidate.data_from_flags(entries[0].model)
    if source is None:
        raise InputError("the explorer needs images; expected --data; got none")
    if given.rows:
        records, remark = _read_rows(Path(given.rows)), f"From {Path(given.rows).name}."
    else:
        rows = compare(
            entries,
            source=source,
            timing=Timing() if given.measure else None,
            batch_size=given.batch_size,
            note=lambda text: print(text, file=sys.stderr, flush=True),
        )
        records, remark = [row.record() for row in rows], environment.line(environment.describe())
    write_report(
        given.output,
        entries,
        records,
        source,
        images=given.images,
        title=given.title,
        remark=remark,
    )
    print(f"Written to {given.output}")


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: expected a table's JSON; got {error!r}") from error


if __name__ == "__main__":
    define_flags()
    start.run(main)
