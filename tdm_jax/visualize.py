r"""Draws what becomes of each patch: `python -m tdm_jax.visualize --checkpoint=... --images=...`.

    python -m tdm_jax.visualize --checkpoint=deit_small.pth --images=photos --reducer=tdm,evit \
        --keep_rate=0.5 --output=pictures
    python -m tdm_jax.visualize --checkpoint=runs/digits/model --data=digits --layers=1,2,3

For each image one figure, as PNG and SVG. Its rows are stages; its columns the image itself, the
two poles that TDM lies between (importance only: the inattentive dropped; diversity only: all
tokens clustered), and each method. `--images` is one image or a folder of them, whole as far as
their shape allows, else prepared as the model says; `--data` takes the first of a validation split
instead.
"""

from pathlib import Path

from absl import flags
from tqdm import tqdm

from tdm_jax.analysis.candidate import Candidate, Loaded, check_weights, make_candidate
from tdm_jax.cli import flags as shared
from tdm_jax.cli import start
from tdm_jax.data.pictures import read_examples, read_images
from tdm_jax.data.preprocessing import data_config_for
from tdm_jax.errors import InputError, unknown
from tdm_jax.plotting import figure
from tdm_jax.plotting.stages import draw, source_maps

FLAGS = flags.FLAGS
# What the paper's first figure sets beside a method, as columns of their own.
POLES = {"importance only": "tdm/preset=importance", "diversity only": "tdm/preset=diversity"}
FORMATS = ("png", "svg")


def define_flags() -> None:
    """The command's flags; not at import, so that programs may import several commands."""
    shared.define_checkpoint()
    flags.DEFINE_string("images", "", "An image, or a folder of images.")
    shared.define_data()
    flags.DEFINE_integer("count", 8, "How many images of --data.", lower_bound=1)
    flags.DEFINE_list("reducer", ["tdm"], "Methods, with settings as in tdm/preset=published.")
    flags.DEFINE_float("keep_rate", 0.5, "Keep rate of every method.")
    flags.DEFINE_bool("poles", True, "Add importance only and diversity only.")
    flags.DEFINE_integer("cell", 224, "Small images are enlarged to about this width.", 1, 4096)
    flags.DEFINE_list("formats", list(FORMATS), "Formats of the figures: png, svg or both.")
    shared.define_output("the figures", default="pictures")


def candidates_from_flags() -> dict[str, Candidate]:
    """The methods of the figure by their labels, the poles first.

    Raises:
      InputError: a flag's value is not usable.
    """
    methods = (POLES if FLAGS.poles else {}) | {method: method for method in FLAGS.reducer}
    if not methods:
        raise InputError("--reducer: expected at least one method, or --poles; got none")
    loaded: Loaded = {}
    settings = shared.checkpoint()
    (checkpoint,) = settings.pop("models")
    candidates = {
        label: make_candidate(checkpoint, method, FLAGS.keep_rate, loaded=loaded, **settings)
        for label, method in methods.items()
    }
    check_weights(list(candidates.values()))
    return candidates


def main() -> None:
    """The command."""
    output = shared.output() or Path()
    for name in FLAGS.formats:
        if name not in FORMATS:
            raise unknown("format", name, FORMATS)
    if bool(FLAGS.images) == bool(FLAGS.data):
        raise InputError(
            "expected either --images or --data; got " + ("both" if FLAGS.data else "none")
        )
    if FLAGS.images and output.resolve().is_relative_to(Path(FLAGS.images).expanduser().resolve()):
        raise InputError(
            f"--output: {output} lies within --images={FLAGS.images}; expected a folder of its own"
        )
    candidates = candidates_from_flags()
    model = next(iter(candidates.values())).model
    if FLAGS.images:
        # The whole image, as far as its shape allows.
        settings = {"crop_pct": 1.0, **shared.preprocessing()}
        data_config = data_config_for(model, "folder", data_dir=FLAGS.images, **settings)
        pictures = read_images(FLAGS.images, data_config, smallest=model.patch_size)
    else:
        data_config = data_config_for(model, **shared.data())
        pictures = read_examples(data_config, FLAGS.count)
    drawings = source_maps(candidates, data_config, pictures)
    for picture, columns in tqdm(drawings, total=len(pictures), unit="image"):
        drawn = draw(picture, columns, FLAGS.cell)
        for suffix in FLAGS.formats:
            figure.save(drawn, output / f"{picture.name}.{suffix}")
    print(f"{len(pictures)} figures in {output}/")


if __name__ == "__main__":
    define_flags()
    start.run(main)
