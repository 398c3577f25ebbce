"""Figures for folders and data sets: what is drawn, and what is refused in one line.

Covers tdm_jax.visualize.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tdm_jax import create_model, visualize
from tdm_jax.analysis.candidate import make_candidate
from tdm_jax.checkpoint import describe, save_model
from tdm_jax.data.device_transforms import normalise
from tdm_jax.data.pictures import Picture, read_images
from tdm_jax.data.preprocessing import data_config_for
from tdm_jax.errors import InputError
from tdm_jax.plotting.figure import to_image
from tdm_jax.plotting.patch_maps import MASK, SourceMap
from tdm_jax.plotting.principal_colors import PrincipalColors
from tdm_jax.plotting.stages import Seen, draw, draw_features, look
from tdm_jax.reduction.token_state import TokenKind
from tests import commands

ARGUMENTS = ("--layers=1,2", "--keep_rate=0.5")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("rgb") / "model", (16, 24), 3)


@pytest.fixture(scope="module")
def grey_checkpoint(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("grey") / "model", (28, 28), 1)


def saved(path, size, channels):
    model = create_model(
        "vit",
        image_size=size,
        patch_size=4,
        in_channels=channels,
        width=16,
        depth=3,
        num_heads=2,
        num_classes=10,
    )
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *size, channels)))
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(random.normal(0, 0.1, s.shape), s.dtype), shapes)
    save_model(path, describe(model), params)
    return path


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.png", "b.jpg"):
        picture(60, 50).save(folder / name)
    return folder


def picture(width, height, mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 4), np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.slow
def test_a_folder_becomes_figures(tmp_path, checkpoint, photos, capsys):
    output = tmp_path / "out"
    arguments = [f"--checkpoint={checkpoint}", f"--images={photos}", f"--output={output}"]
    commands.run(visualize, *arguments, *ARGUMENTS, "--reducer=tdm,evit")
    assert capsys.readouterr().out == f"4 figures in {output}/\n"
    names = [f"{name}{end}" for name in "ab" for end in (".png", ".svg")]
    names += [f"{name}_features{end}" for name in "ab" for end in (".png", ".svg")]
    assert sorted(p.name for p in output.iterdir()) == sorted(names)
    text = (output / "a.svg").read_text()
    for word in ("original", "importance only", "diversity only", "tdm", "evit", "block 2"):
        assert f">{word}<" in text
    for tokens in ("24 patches", "12 tokens", "13 tokens", "6 tokens"):
        assert f">{tokens}<" in text
    text = (output / "a_features.svg").read_text()
    words = ("original", "unreduced", "importance only", "evit", "keep rate 0.5", "24 tokens")
    for word in words:
        assert f">{word}<" in text
    assert len(re.findall(r">cosine \d\.\d{3}, \d\d% of the cost<", text)) == 4


def test_keep_rates_are_a_figure_each_and_the_rows_of_the_features(tmp_path, checkpoint, photos):
    """With methods that have no keep rate, and tokens beside the features."""
    commands.run(
        visualize,
        f"--checkpoint={checkpoint}",
        f"--images={photos / 'a.png'}",
        "--reducer=none,tome/r=4,topk",
        "--nopoles",
        "--tokens",
        "--keep_rate=0.75,0.5",
        "--layers=1,2",
        "--formats=svg",
        f"--output={tmp_path / 'out'}",
    )
    names = ["a_0.5.svg", "a_0.75.svg", "a_features.svg"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names
    assert ">a, keep rate 0.75<" in (tmp_path / "out/a_0.75.svg").read_text()
    text = (tmp_path / "out/a_features.svg").read_text()
    for word in ("keep rate 0.75", "keep rate 0.5", "topk, features", "6 tokens"):
        assert f">{word}<" in text
    assert text.count("<image ") >= 2 * (2 + 2 * 3)
    # `none` is the unreduced model: nothing is lost, nothing saved.
    assert text.count(">cosine 1.000, 100% of the cost<") == 2


def test_each_model_runs_once_an_image(checkpoint, photos):
    candidate = make_candidate(str(checkpoint), "topk", 0.5, layers=(1,))
    config = data_config_for(candidate.model, "folder", data_dir="x", crop_pct=1.0)
    pictures = read_images(photos, config)
    plain = candidate.unreduced()
    looks = list(look([plain, candidate, candidate], config, pictures))
    assert [picture.name for picture, _ in looks] == ["a", "b"]
    for picture, seen in looks:
        assert list(seen) == [plain.model, candidate.model]
        assert seen[plain.model].stages == {} and seen[plain.model].tokens() == 24
        assert seen[candidate.model].tokens() == 12
        assert seen[candidate.model].macs < seen[plain.model].macs
        image = normalise(jnp.asarray(picture.pixels)[None], config.mean, config.std)
        apply = jax.jit(lambda v, x: candidate.model.apply(v, x, return_info=True)[1].patches)
        expected = apply(candidate.variables, image)[0]
        np.testing.assert_allclose(seen[candidate.model].features, expected, atol=1e-5)


def test_features_are_drawn_in_the_unreduced_models_colours():
    picture = Picture("x", np.zeros((8, 12, 3), np.uint8))
    own, other = np.random.default_rng(0).standard_normal((2, 6, 5)).astype(np.float32)
    plain, method = Seen(100, (2, 3), {}, own), Seen(50, (2, 3), {}, other)
    drawn = draw_features(picture, plain, {"row": {"m": method}}, cell=12)
    colors = PrincipalColors.fit(own, (2, 3))
    _, first, second = (placed.drawing for placed in drawn.drawings)
    np.testing.assert_array_equal(first.pixels, colors(own))
    np.testing.assert_array_equal(second.pixels, colors(other))
    assert (first.scale, second.scale) == (4, 4)


def test_a_data_set_becomes_figures(tmp_path, grey_checkpoint):
    commands.run(
        visualize,
        f"--checkpoint={grey_checkpoint}",
        "--data=digits",
        "--count=1",
        "--nopoles",
        "--formats=png",
        f"--output={tmp_path / 'out'}",
        *ARGUMENTS,
    )
    names = ["digits_0000.png", "digits_0000_features.png"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names


def test_rows_follow_the_method_with_fewest_stages():
    def seen(*layers):
        assign, kind = np.array([0, -1, 0, 0]), np.array([TokenKind.KEPT])
        stages = {layer: SourceMap((2, 2), assign, kind) for layer in layers}
        return Seen(0, (2, 2), stages, np.zeros((4, 3), np.float32))

    image = Picture("x", np.zeros((8, 8, 1), np.uint8))
    drawn = draw(image, {"often": seen(0, 1, 2, 3), "late": seen(2)}, cell=8)
    assert len(drawn.drawings) == 3 + 2  # one row of three, two swatches
    assert "block 3" in [text.text for text in drawn.texts]
    # A method that has not begun yet shows the image as it is.
    drawn = draw(image, {"early": seen(0, 3), "late": seen(2, 3)}, cell=8)
    assert drawn.drawings[2].drawing.marks == ()
    assert drawn.drawings[5].drawing.marks


def test_the_poles_drop_and_cluster(checkpoint, photos):
    candidates = {
        label: make_candidate(str(checkpoint), method, 0.5, layers=(1, 2))
        for label, method in visualize.POLES.items()
    }
    model = candidates["importance only"].model
    config = data_config_for(model, "folder", data_dir="x", crop_pct=1.0)
    pictures = read_images(photos, config)[:1]
    ((_, seen),) = look(candidates.values(), config, pictures)
    importance, diversity = (seen[one.model] for one in candidates.values())
    assert (importance.stages[1].assign < 0).sum() == 12
    assert (diversity.stages[1].assign >= 0).all()
    assert diversity.stages[1].tokens == 12
    drawn = draw(pictures[0], {"importance": importance}, cell=24)
    x, y, _ = drawn.drawings[1]
    first = int(np.flatnonzero(importance.stages[1].assign < 0)[0])
    row, col = divmod(first, 6)
    patch = np.asarray(to_image(drawn))[y + 4 * row + 2, x + 4 * col + 2]
    assert np.abs(patch.astype(int) - MASK).max() < 35


def clashing(folder):
    picture(30, 30).save(folder / "a_features.png")


def broken(folder):
    (folder / "c.png").write_bytes((folder / "a.png").read_bytes()[:200])


def tiny(folder):
    Image.new("RGB", (3, 100)).save(folder / "c.png")


def empty(folder):
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "arguments", "message"),
    [
        (broken, [], "c.png: expected a readable image"),
        (tiny, [], "c.png: 3 x 100 pixels; expected at least 4 x 4"),
        (empty, [], "no image in"),
        (clashing, [], "2 figures would be a_features; expected images with other names"),
        (None, ["--images=nowhere"], "nowhere does not exist"),
        (None, ["--images="], "either --images or --data; got none"),
        (None, ["--data=digits"], "got both"),
        (None, ["--reducer=tmd"], "did you mean 'tdm'"),
        (None, ["--reducer=", "--nopoles"], "at least one method"),
        (None, ["--keep_rate=1.5"], r"keep_rate must be in \(0, 1\]; got 1.5"),
        (None, ["--keep_rate=1"], "expected a keep rate below 1"),
        (None, ["--keep_rate=0.5,1"], "expected a keep rate below 1"),
        (None, ["--keep_rate=0.5,half"], "--keep_rate: expected numbers; got '0.5,half'"),
        (None, ["--keep_rate="], "--keep_rate: expected at least one; got none"),
        (None, ["--layers=1,x"], "expected numbers"),
        (None, ["--layers=7"], "within the 3 blocks"),
        (None, ["--mean=0.5,0.5"], "3 numbers"),
        (None, ["--formats=gif"], "expected one of: png, svg"),
        (None, ["--checkpoint=deit_tiny_patch16_224"], "a name without weights"),
        (None, ["--checkpoint=nothing.pth"], "nothing.pth"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    tmp_path, checkpoint, photos, spoil, arguments, message
):
    if spoil:
        spoil(photos)
    output = tmp_path / "out"
    names = [f"--checkpoint={checkpoint}", f"--images={photos}", f"--output={output}"]
    with pytest.raises(InputError, match=message) as caught:
        commands.run(visualize, *names, *ARGUMENTS, *arguments)
    assert "\n" not in str(caught.value)
    assert not output.exists()


def test_the_images_themselves_are_never_overwritten(checkpoint, photos):
    before = (photos / "a.png").read_bytes()
    for output in (photos, photos / "out"):
        names = [f"--checkpoint={checkpoint}", f"--images={photos}", f"--output={output}"]
        with pytest.raises(InputError, match="expected a folder of its own"):
            commands.run(visualize, *names, *ARGUMENTS)
    assert (photos / "a.png").read_bytes() == before
    assert len(list(photos.iterdir())) == 2
