"""Converts checkpoints: `python -m tdm_jax.convert --input=deit_small.pth --output=deit_small`.

`--input` is anything that `load_pretrained` reads. `--output` becomes an Orbax folder that it reads
too, or, if it ends in .safetensors, a file with timm's names; a reducer and how images are prepared
go along. Prints every array with our name of it and its shape.
"""

from absl import flags

from tdm_jax.checkpoint.conversion import convert, mapping_table
from tdm_jax.cli import start
from tdm_jax.errors import InputError
from tdm_jax.models.vit import parameter_count

FLAGS = flags.FLAGS


def _image_size(sides: list[str] | None) -> tuple[int, int] | None:
    if sides is None:
        return None
    if len(sides) not in (1, 2) or not all(side.isdigit() for side in sides):
        raise InputError(f"--image_size: expected height,width or one number; got {sides}")
    return int(sides[0]), int(sides[-1])


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
    checkpoint, model, variables = convert(
        FLAGS.input,
        FLAGS.output,
        ema=FLAGS.ema,
        overwrite=FLAGS.overwrite,
        num_heads=FLAGS.num_heads,
        image_size=_image_size(FLAGS.image_size),
    )
    print(mapping_table(checkpoint, variables))
    size = "x".join(map(str, model.image_size))
    print(
        f"{parameter_count(variables):,} parameters: {model.depth} blocks of width "
        f"{model.width}, {model.num_heads} heads, images {size}, patches of {model.patch_size}, "
        f"{model.num_classes} classes{', distilled' if model.distilled else ''} -> {FLAGS.output}"
    )


if __name__ == "__main__":
    define_flags()
    start.run(main)
