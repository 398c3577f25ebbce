"""Converts checkpoints: `python -m tdm_jax.convert --input=deit_small.pth --output=deit_small`.

`--input` is anything that `load_pretrained` reads. `--output` becomes an Orbax folder that it reads
too, or, if it ends in .safetensors, a file with timm's names; `--format` makes it a folder of timm
or of Hugging Face. A reducer and how images are prepared go along. Prints every array with our name
of it and its shape.
"""

from absl import flags

from tdm_jax.checkpoint.conversion import FORMATS, convert, mapping_table
from tdm_jax.cli import start
from tdm_jax.errors import InputError
from tdm_jax.models.heads import POOLS
from tdm_jax.models.vit import INTERPOLATIONS, parameter_count
from tdm_jax.ops.activations import ACTIVATIONS

FLAGS = flags.FLAGS
# What a file may leave open.
_FIELDS = ("num_heads", "num_classes", "layer_norm_eps", "activation", "pool", "interpolation")


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
    flags.DEFINE_enum(
        "format", None, FORMATS, "What to write; by default what the name of the output says."
    )
    flags.DEFINE_bool("ema", False, "Take a training checkpoint's averaged weights.")
    flags.DEFINE_integer(
        "num_heads", None, "Attention heads, where the width is no multiple of 64."
    )
    flags.DEFINE_list(
        "image_size", None, "height,width (or one number): resize the position embedding for it."
    )
    flags.DEFINE_integer("num_classes", None, "0 leaves the head out.")
    flags.DEFINE_float("layer_norm_eps", None, "Where nothing tells and the family's is wrong.")
    for name, choices in (
        ("activation", tuple(ACTIVATIONS)),
        ("pool", POOLS),
        ("interpolation", INTERPOLATIONS),
    ):
        flags.DEFINE_enum(name, None, choices, "Where nothing tells and the family's is wrong.")
    flags.DEFINE_bool("overwrite", False, "Replace an output that exists.")


def main() -> None:
    """The command."""
    checkpoint, model, variables = convert(
        FLAGS.input,
        FLAGS.output,
        format=FLAGS.format,
        ema=FLAGS.ema,
        overwrite=FLAGS.overwrite,
        image_size=_image_size(FLAGS.image_size),
        **{name: FLAGS[name].value for name in _FIELDS},
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
