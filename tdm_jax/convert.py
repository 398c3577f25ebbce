"""Converts checkpoints: `python -m tdm_jax.convert --input=deit_small.pth --output=deit_small`.

`--input` is anything that `load_pretrained` reads. `--output` becomes an Orbax folder that it reads
too, or, if it ends in .safetensors, a file with timm's names; a reducer and how images are prepared
go along. Prints every array with our name of it and its shape.
"""

from pathlib import Path

from absl import flags
from flax import traverse_util

from tdm_jax.checkpoint import describe, save_model, save_safetensors
from tdm_jax.checkpoint.names import ParamMapping
from tdm_jax.checkpoint.pretrained import Loaded, load
from tdm_jax.checkpoint.raw_checkpoint import read_raw_checkpoint
from tdm_jax.checkpoint.saved_model import is_saved_model
from tdm_jax.cli import start
from tdm_jax.errors import InputError
from tdm_jax.models.vit import parameter_count

FLAGS = flags.FLAGS


def convert(
    source: str | Path,
    output: str | Path,
    *,
    ema: bool = False,
    overwrite: bool = False,
    num_heads: int | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> Loaded:
    """Reads a checkpoint of any kind and writes it as an Orbax folder or timm-named safetensors.

    Args:
      source: what `load_pretrained` reads.
      output: a folder, or a name that ends in .safetensors.
      ema: take a training checkpoint's averaged weights.
      overwrite: replace an output that exists, once the new one is complete.
      num_heads: as in `load_pretrained`.
      image_size: as in `load_pretrained`.

    Returns:
      The model, its variables, and where each came from.

    Raises:
      InputError: the output exists, or the source is unreadable or no model of ours.
    """
    _check_output(Path(output), overwrite)
    checkpoint = read_raw_checkpoint(source, ema=ema)
    loaded = load(checkpoint, num_heads=num_heads, image_size=image_size)
    if str(output).endswith(".safetensors"):
        save_safetensors(output, loaded.model, loaded.variables, overwrite=overwrite)
    else:
        save_model(output, describe(loaded.model), loaded.variables, overwrite=overwrite)
    return loaded


def _check_output(output: Path, overwrite: bool) -> None:
    # The writers refuse as well, but only after the work is done.
    if not output.exists():
        return
    if not overwrite:
        raise InputError(f"{output} exists; expected a new name, or --overwrite")
    if output.suffix != ".safetensors" and not is_saved_model(output):
        raise InputError(f"{output} exists and is no model that this command wrote; it stays")


def mapping(loaded: Loaded) -> str:
    """The table of what became what: source names, our name, our shape."""
    shapes = {
        path: str(list(array.shape))
        for path, array in traverse_util.flatten_dict(loaded.variables["params"], sep="/").items()
    }
    rows = [(_sources(leaf), leaf.path, shapes[leaf.path]) for leaf in loaded.mappings]
    rows = [("source", "tdm_jax", "shape"), *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows)


def _sources(mapping: ParamMapping) -> str:
    # query, key and value differ in one part of their names.
    parts = zip(*(name.split(".") for name in mapping.sources), strict=True)
    return ".".join(
        part[0] if len(set(part)) == 1 else "{" + ",".join(part) + "}" for part in parts
    )


def _image_size(sides: list[str] | None) -> int | tuple[int, int] | None:
    if sides is None:
        return None
    if len(sides) not in (1, 2) or not all(side.isdigit() for side in sides):
        raise InputError(f"--image_size: expected height,width or one number; got {sides}")
    height, width = int(sides[0]), int(sides[-1])
    return (height, width)


def define_flags() -> None:
    """The command's flags; not at import, so that programs may import several commands."""
    flags.DEFINE_string("input", None, "Checkpoint to convert.", required=True)
    flags.DEFINE_string(
        "output", None, "Where to: a folder, or a name that ends in .safetensors.", required=True
    )
    flags.DEFINE_bool("ema", False, "Take a training checkpoint's averaged weights.")
    flags.DEFINE_integer(
        "num_heads", None, "Attention heads, where the width is no multiple of 64."
    )
    flags.DEFINE_list(
        "image_size", None, "height,width (or one number): resize the position embedding for it."
    )
    flags.DEFINE_bool("overwrite", False, "Replace an output that exists.")


def main() -> None:
    """The command."""
    loaded = convert(
        FLAGS.input,
        FLAGS.output,
        ema=FLAGS.ema,
        overwrite=FLAGS.overwrite,
        num_heads=FLAGS.num_heads,
        image_size=_image_size(FLAGS.image_size),
    )
    print(mapping(loaded))
    model = loaded.model
    size = "x".join(map(str, model.image_size))
    print(
        f"{parameter_count(loaded.variables):,} parameters: {model.depth} blocks of width "
        f"{model.width}, {model.num_heads} heads, images {size}, patches of {model.patch_size}, "
        f"{model.num_classes} classes{', distilled' if model.distilled else ''} -> {FLAGS.output}"
    )


if __name__ == "__main__":
    define_flags()
    start.run(main)
