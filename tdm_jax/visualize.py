r"""Draws what becomes of each patch: `python -m tdm_jax.visualize --checkpoint=... --images=...`.

    python -m tdm_jax.visualize --checkpoint=deit_small.pth --images=photos --reducer=tdm,evit \
        --keep_rate=0.7,0.5,0.3 --output=pictures
    python -m tdm_jax.visualize --checkpoint=runs/digits/model --data=digits --layers=1,2,3

For each image and keep rate one figure of its tokens, as PNG and SVG. Its rows are stages; its
columns the image itself, the two poles that TDM lies between (importance only: the inattentive
dropped; diversity only: all tokens clustered), and each method.

And for each image one figure of its features (`..._features`), their three principal components as
colours. Its rows are keep rates; its columns the image, the unreduced model, and each method after
un-merging.

`--images` is one image or a folder of them, whole as far as their shape allows, else prepared as
the model says; `--data` takes the first of a validation split instead.
"""

from collections import Counter
from collections.abc import Collection
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
from tdm_jax.plotting.stages import draw, draw_features, look

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
    flags.DEFINE_list("keep_rate", ["0.5"], "Keep rates of every method.")
    flags.DEFINE_bool("poles", True, "Add importance only and diversity only.")
    flags.DEFINE_bool("tokens", False, "Beside each method's features, draw its tokens too.")
    flags.DEFINE_integer("cell", 224, "Small images are enlarged to about this width.", 1, 4096)
    flags.DEFINE_list("formats", list(FORMATS), "Formats of the figures: png, svg or both.")
    shared.define_output("the figures", default="pictures")


def runs_from_flags() -> dict[float, dict[str, Candidate]]:
    """For each keep rate the methods of the figures by their labels, the poles first.

    Raises:
      InputError: a flag's value is not usable.
    """
    methods = (POLES if FLAGS.poles else {}) | {method: method for method in FLAGS.reducer}
    if not methods:
        raise InputError("--reducer: expected at least one method, or --poles; got none")
    rates = shared.numbers("keep_rate")
    if not rates:
        raise InputError("--keep_rate: expected at least one; got none")
    loaded: Loaded = {}
    settings = shared.checkpoint()
    (checkpoint,) = settings.pop("models")
    runs = {
        rate: {
            label: make_candidate(checkpoint, method, rate, loaded=loaded, **settings)
            for label, method in methods.items()
        }
        for rate in rates
    }
    check_weights([one for candidates in runs.values() for one in candidates.values()])
    return runs


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
    runs = runs_from_flags()
    candidates = [one for methods in runs.values() for one in methods.values()]
    unreduced = candidates[0].unreduced()
    model = unreduced.model
    if FLAGS.images:
        # The whole image, as far as its shape allows.
        settings = {"crop_pct": 1.0, **shared.preprocessing()}
        data_config = data_config_for(model, "folder", data_dir=FLAGS.images, **settings)
        pictures = read_images(FLAGS.images, data_config, smallest=model.patch_size)
    else:
        data_config = data_config_for(model, **shared.data())
        pictures = read_examples(data_config, FLAGS.count)
    names = {picture.name: _names(picture.name, runs) for picture in pictures}
    taken = Counter(name.casefold() for group in names.values() for name in group)
    name, times = taken.most_common(1)[0]
    if times > 1:
        raise InputError(f"{times} figures would be {name}; expected images with other names")
    looks = look([unreduced, *candidates], data_config, pictures)
    for picture, seen in tqdm(looks, total=len(pictures), unit="image"):
        rows = {
            f"keep rate {rate:g}": {label: seen[one.model] for label, one in methods.items()}
            for rate, methods in runs.items()
        }
        figures = [
            draw(picture._replace(name=f"{picture.name}, {label}"), row, FLAGS.cell)
            for label, row in rows.items()
        ]
        figures.append(draw_features(picture, seen[model], rows, FLAGS.cell, FLAGS.tokens))
        for name, drawn in zip(names[picture.name], figures, strict=True):
            for suffix in FLAGS.formats:
                figure.save(drawn, output / f"{name}.{suffix}")
    print(f"{taken.total()} figures in {output}/")


def _names(name: str, rates: Collection[float]) -> list[str]:
    """What one image's figures are called: of the tokens at each keep rate, and of the features."""
    tokens = [f"{name}_{rate:g}" for rate in rates] if len(rates) > 1 else [name]
    return [*tokens, f"{name}_features"]


if __name__ == "__main__":
    define_flags()
    start.run(main)
