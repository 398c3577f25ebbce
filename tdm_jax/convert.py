"""Converts checkpoints: `python -m tdm_jax.convert --input=deit_small.pth --output=deit_small`.

`--input` is a facebook or timm .pth, a .safetensors file, a Hugging Face folder, or what this
command wrote. `--output` becomes an Orbax folder that `load_pretrained` reads, or, if it ends in
.safetensors, a file with timm's names. Prints every array with our name of it and its shape.
"""

from pathlib import Path

from absl import flags
from flax import traverse_util

from tdm_jax.checkpoint.export import save_safetensors
from tdm_jax.checkpoint.names import ParamMapping
from tdm_jax.checkpoint.pretrained import Loaded, describe, load
from tdm_jax.checkpoint.raw_checkpoint import read_raw_checkpoint
from tdm_jax.checkpoint.saved_model import is_saved_model, save_model
from tdm_jax.cli import start
from tdm_jax.errors import InputError
from tdm_jax.models.vit import parameter_count


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
      The model, its parameters, and where each came from.

    Raises:
      InputError: the output exists, or the source is unreadable or no model of ours.
    """
    _check_output(Path(output), overwrite)
    told = {"num_heads": num_heads, "image_size": image_size}
    told = {name: value for name, value in told.items() if value is not None}
    loaded = load(read_raw_checkpoint(source, ema=ema), **told)
    if str(output).endswith(".safetensors"):
        save_safetensors(output, loaded.model, loaded.params, overwrite=overwrite)
    else:
        save_model(output, describe(loaded.model), loaded.params, overwrite=overwrite)
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
        for path, array in traverse_util.flatten_dict(loaded.params["params"], sep="/").items()
    }
    rows = [(_sources(entry), entry.path, shapes[entry.path]) for entry in loaded.entries]
    rows = [("source", "tdm_jax", "shape"), *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows)


def _sources(entry: ParamMapping) -> str:
    if len(entry.sources) == 1:
        return entry.sources[0]
    # query, key and value differ in one part of their names.
    parts = [set(part) for part in zip(*(s.split(".") for s in entry.sources), strict=True)]
    order = [part.split(".") for part in entry.sources]
    return ".".join(
        "{" + ",".join(name[i] for name in order) + "}" if len(part) > 1 else part.pop()
        for i, part in enumerate(parts)
    )


def _image_size(given: list[str] | None) -> int | tuple[int, int] | None:
    if given is None:
        return None
    if len(given) not in (1, 2) or not all(side.isdigit() for side in given):
        raise InputError(f"--image_size: expected height,width or one number; got {given}")
    sides = tuple(map(int, given))
    return sides[0] if len(sides) == 1 else sides


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
    given = flags.FLAGS
    loaded = convert(
        given.input,
        given.output,
        ema=given.ema,
        overwrite=given.overwrite,
        num_heads=given.num_heads,
        image_size=_image_size(given.image_size),
    )
    print(mapping(loaded))
    model = loaded.model
    size = "x".join(map(str, model.image_size))
    print(
        f"{parameter_count(loaded.params):,} parameters: {model.depth} blocks of width "
        f"{model.width}, {model.num_heads} heads, images {size}, patches of {model.patch_size}, "
        f"{model.num_classes} classes{', distilled' if model.distilled else ''} -> {given.output}"
    )


if __name__ == "__main__":
    define_flags()
    start.run(main)
