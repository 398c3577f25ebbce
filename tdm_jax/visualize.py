"""Draws what becomes of each patch: `python -m tdm_jax.visualize --checkpoint=... --images=...`.

    python -m tdm_jax.visualize --checkpoint=deit_small.pth --images=photos --reducer=tdm,evit \
        --keep_rate=0.5 --output=pictures
    python -m tdm_jax.visualize --checkpoint=runs/digits/model --data=digits --layers=1,2,3

For each image one figure, as PNG and SVG. Its rows are stages; its columns the image itself, the
two poles that TDM lies between (importance only: the inattentive dropped; diversity only: all
tokens clustered), and each method. `--images` is one image or a folder of them, normalised as for
ImageNet unless `--mean` and `--std` say otherwise; `--data` takes the first of a validation split
instead.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import UInt8
from PIL import UnidentifiedImageError
from tqdm import tqdm

from tdm_jax.analysis import candidate, results
from tdm_jax.analysis.candidate import Candidate
from tdm_jax.cli import start
from tdm_jax.data import DataConfig, make_config, open_source
from tdm_jax.data.device_transforms import normalise
from tdm_jax.data.images import CorruptImage, open_image
from tdm_jax.data.sources import IMAGE_SUFFIXES
from tdm_jax.data.transforms import EvalTransform
from tdm_jax.errors import InputError, unknown
from tdm_jax.models.vit import VisionTransformer
from tdm_jax.plotting import figure
from tdm_jax.plotting.figure import Figure, Panel
from tdm_jax.plotting.patch_maps import SourceMap

# What the paper's first figure sets beside a method, as columns of their own.
POLES = {"importance only": "tdm/preset=importance", "diversity only": "tdm/preset=diversity"}
FORMATS = ("png", "svg")


class Picture(NamedTuple):
    """An image as the model takes it, before normalisation; the name is safe as a file's."""

    name: str
    pixels: UInt8[np.ndarray, "h w c"]


class Column(NamedTuple):
    """What a method makes of one image: the source map after each block that changed it."""

    label: str
    stages: dict[int, SourceMap]


def draw(picture: Picture, columns: Sequence[Column], cell: int = 224) -> Figure:
    """The figure of one image: the image itself and what each method makes of it.

    The rows are the stages of the method that has fewest; the others show what they have come to by
    then.

    Args:
      picture: the image.
      columns: from left to right.
      cell: width in pixels up to which small images are enlarged.

    Raises:
      InputError: no method changes the tokens.
    """
    layers = min((list(c.stages) for c in columns if c.stages), key=len, default=None)
    if layers is None:
        raise InputError("no method reduces the tokens here; expected a keep rate below 1")
    patches = next(iter(next(c.stages for c in columns if c.stages).values())).assign.size
    rows = []
    for layer in layers:
        row = [Panel(picture.pixels, caption=f"{patches} patches")]
        for column in columns:
            source = next((s for at, s in reversed(column.stages.items()) if at <= layer), None)
            tokens = patches if source is None else source.tokens
            row.append(Panel(picture.pixels, source, caption=f"{tokens} tokens"))
        rows.append(row)
    labels = ["original", *(column.label for column in columns)]
    return figure.figure(
        rows, labels, [f"block {layer + 1}" for layer in layers], title=picture.name, cell=cell
    )


def source_maps(
    entries: Sequence[tuple[str, Candidate]], source: DataConfig, pictures: Sequence[Picture]
) -> Iterator[tuple[Picture, list[Column]]]:
    """Runs each image through each labelled contender; one compilation each."""

    def stages(entry: Candidate):
        def run(params, image):
            _, info = entry.model.apply(params, image, return_info=True)
            return info.stages

        return jax.jit(run)

    programs = [(label, entry, stages(entry)) for label, entry in entries]
    for picture in pictures:
        image = normalise(jnp.asarray(picture.pixels)[None], source.mean, source.std)
        columns = []
        for label, entry, program in programs:
            grid = entry.model.shape.grid
            found = program(entry.params, image)
            columns.append(Column(label, {s.layer: SourceMap.of(s, 0, grid) for s in found}))
        yield picture, columns


def read_images(path: str | Path, model: VisionTransformer, source: DataConfig) -> list[Picture]:
    """Reads an image, or all images below a folder in the order of their names.

    Transparent, grey, 16-bit and animated images are converted (of an animation the first frame).

    Args:
      path: of a file or a folder.
      model: says how small an image may be: one patch.
      source: says how an image is scaled and cropped.

    Raises:
      InputError: there is nothing, no image, or one that cannot be read or is too small.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise InputError(
            f"--images: {path} does not exist; expected an image or a folder of images"
        )
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        files = [p for p in files if p.is_file() and not p.name.startswith(".")]
    if not files:
        raise InputError(f"--images: no image in {path}; expected {', '.join(IMAGE_SUFFIXES)}")
    names = _names([file.relative_to(path) if file != path else Path(file.name) for file in files])
    return [
        Picture(name, _read(file, model, source)) for name, file in zip(names, files, strict=True)
    ]


def _read(file: Path, model: VisionTransformer, source: DataConfig) -> UInt8[np.ndarray, "h w c"]:
    try:
        image = open_image(file.read_bytes())
        if min(image.size) < model.patch_size:
            raise InputError(
                f"{file}: {image.width} x {image.height} pixels; expected at least one patch, "
                f"{model.patch_size} x {model.patch_size}"
            )
        return EvalTransform(source)(image)
    except (OSError, CorruptImage) as error:
        # Pillow names no file here, but an address.
        unidentified = isinstance(error.__cause__, UnidentifiedImageError)
        reason = "no known format" if unidentified else str(error) or type(error).__name__
        raise InputError(f"{file}: expected a readable image; got: {reason}") from error


def _names(paths: Sequence[Path]) -> list[str]:
    """A file name without suffix for each path, no two alike even where case is ignored."""
    short = ["_".join(path.with_suffix("").parts) for path in paths]
    folded = [name.casefold() for name in short]
    if len(set(folded)) == len(folded):
        return short
    return [f"{i:04d}_{name}" for i, name in enumerate(short)]


def read_data(source: DataConfig, count: int) -> list[Picture]:
    """The first images of a data set's validation split.

    Raises:
      InputError: the data set cannot be read.
    """
    records, transform = open_source(source, "validation"), EvalTransform(source)
    pictures = []
    for i in range(min(count, len(records))):
        try:
            pixels = transform(open_image(records[i]["image"]))
        except (OSError, CorruptImage) as error:
            raise InputError(f"{records.describe(i)}: unreadable image: {error}") from error
        pictures.append(
            Picture(f"{source.name.replace(':', '_').replace('/', '_')}_{i:04d}", pixels)
        )
    return pictures


def define_flags() -> None:
    """The command's flags; not at import, so that programs may import several commands."""
    flags.DEFINE_string("checkpoint", None, "Anything that load_pretrained reads.", required=True)
    flags.DEFINE_string("images", "", "An image, or a folder of images.")
    flags.DEFINE_string("data", "", "Instead: digits, folder or tfds:<name>.")
    flags.DEFINE_string("data_dir", "", "Root of the folder, or TFDS's data_dir.")
    flags.DEFINE_integer("count", 8, "How many images of --data.", lower_bound=1)
    flags.DEFINE_list("reducer", ["tdm"], "Methods, with settings as in tdm/preset=published.")
    flags.DEFINE_float("keep_rate", 0.5, "Of every method.")
    flags.DEFINE_list("layers", None, "Blocks where methods act, from 0; default: their own.")
    flags.DEFINE_bool("poles", True, "Add importance only and diversity only.")
    flags.DEFINE_integer("num_heads", None, "Heads of a checkpoint that does not say (else of 64).")
    flags.DEFINE_list("mean", None, "Per channel, of images scaled to [0, 1].")
    flags.DEFINE_list("std", None, "Per channel, of images scaled to [0, 1].")
    flags.DEFINE_integer("cell", 224, "Small images are enlarged to about this width.", 1, 4096)
    flags.DEFINE_list("formats", list(FORMATS), "Of png and svg.")
    flags.DEFINE_string("output", "pictures", "Folder for the figures.")


def entries_from_flags() -> list[tuple[str, Candidate]]:
    """The labelled methods of the figure, the poles first.

    Raises:
      InputError: a flag's value is not usable.
    """
    given = flags.FLAGS
    layers = given.layers and _numbers("layers", given.layers, int)
    overrides = {} if given.num_heads is None else {"num_heads": given.num_heads}
    wanted = dict(POLES) if given.poles else {}
    wanted |= {method: method for method in given.reducer}
    loaded = {}
    entries = []
    for label, method in wanted.items():
        one = candidate.contender(
            given.checkpoint, method, given.keep_rate, layers=layers, loaded=loaded, **overrides
        )
        if one.params is None:
            raise InputError(
                f"--checkpoint: {given.checkpoint} is a model without weights; expected a file or "
                "folder with trained ones"
            )
        entries.append((label, one))
    if not entries:
        raise InputError("--reducer: expected at least one method, or --poles; got none")
    return entries


def data_from_flags(model: VisionTransformer) -> DataConfig:
    """How images are scaled, cropped and normalised, and for `--data` where they are."""
    given = flags.FLAGS
    if bool(given.images) == bool(given.data):
        raise InputError(
            "expected either --images or --data; got " + ("both" if given.data else "none")
        )
    settings = {"image_size": model.image_size, "channels": model.in_channels}
    if model.in_channels == 1:
        digits = make_config(name="digits")
        settings |= {"mean": digits.mean, "std": digits.std}
    for name in ("mean", "std"):
        if getattr(given, name) is not None:
            settings[name] = _numbers(name, getattr(given, name), float)
    if given.data:
        candidate.check_channels(model, given.data)
        return make_config(name=given.data, data_dir=given.data_dir, **settings)
    # The whole image, as far as its shape allows.
    return make_config(name="folder", data_dir=given.images, crop_pct=1.0, **settings)


def _numbers(flag: str, texts: Sequence[str], kind: type) -> tuple:
    try:
        return tuple(kind(text) for text in texts)
    except ValueError as error:
        raise InputError(f"--{flag}: expected numbers, comma-separated; got {texts}") from error


def _check_output(output: Path, images: str) -> None:
    if images and output.resolve().is_relative_to(Path(images).expanduser().resolve()):
        raise InputError(
            f"--output: {output} lies within --images={images}; expected a folder of its own"
        )


def main() -> None:
    """The command."""
    given = flags.FLAGS
    output = Path(given.output)
    results.check_folder(output)
    for name in given.formats:
        if name not in FORMATS:
            raise unknown("format", name, FORMATS)
    entries = entries_from_flags()
    model = entries[0][1].model
    source = data_from_flags(model)
    if given.images:
        _check_output(output, given.images)
        pictures = read_images(given.images, model, source)
    else:
        pictures = read_data(source, given.count)
    progress = tqdm(source_maps(entries, source, pictures), total=len(pictures), unit="image")
    for picture, columns in progress:
        drawn = draw(picture, columns, given.cell)
        for suffix in given.formats:
            figure.save(drawn, output / f"{picture.name}.{suffix}")
    print(f"{len(pictures)} figures in {output}/")


if __name__ == "__main__":
    define_flags()
    start.run(main)
