"""Figures for folders and data sets: what is drawn, and what is refused in one line.

Covers tdm_jax.visualize.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tdm_jax import create_model, visualize
from tdm_jax.analysis.candidate import make_candidate
from tdm_jax.checkpoint import describe, save_model
from tdm_jax.data.pictures import Picture, read_images
from tdm_jax.data.preprocessing import data_config_for
from tdm_jax.errors import InputError
from tdm_jax.plotting.figure import to_image
from tdm_jax.plotting.patch_maps import MASK, SourceMap
from tdm_jax.plotting.stages import Column, draw, source_maps
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


def test_a_folder_becomes_figures(tmp_path, checkpoint, photos, capsys):
    output = tmp_path / "out"
    arguments = [f"--checkpoint={checkpoint}", f"--images={photos}", f"--output={output}"]
    commands.run(visualize, *arguments, *ARGUMENTS, "--reducer=tdm,evit")
    assert capsys.readouterr().out == f"2 figures in {output}/\n"
    assert sorted(p.name for p in output.iterdir()) == ["a.png", "a.svg", "b.png", "b.svg"]
    text = (output / "a.svg").read_text()
    for word in ("original", "importance only", "diversity only", "tdm", "evit", "block 2"):
        assert f">{word}<" in text
    for tokens in ("24 patches", "12 tokens", "13 tokens", "6 tokens"):
        assert f">{tokens}<" in text


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
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["digits_0000.png"]


def test_rows_follow_the_method_with_fewest_stages():
    def column(label, *layers):
        assign, kind = np.array([0, -1, 0, 0]), np.array([TokenKind.KEPT])
        return Column(label, {layer: SourceMap((2, 2), assign, kind) for layer in layers})

    image = Picture("x", np.zeros((8, 8, 1), np.uint8))
    drawn = draw(image, [column("often", 0, 1, 2, 3), column("late", 2)], cell=8)
    assert len(drawn.drawings) == 3 + 2  # one row of three, two swatches
    assert "block 3" in [text.text for text in drawn.texts]
    # A method that has not begun yet shows the image as it is.
    drawn = draw(image, [column("early", 0, 3), column("late", 2, 3)], cell=8)
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
    ((_, (importance, diversity)),) = source_maps(candidates, config, pictures)
    assert (importance.stages[1].assign < 0).sum() == 12
    assert (diversity.stages[1].assign >= 0).all()
    assert diversity.stages[1].tokens == 12
    drawn = draw(pictures[0], [importance], cell=24)
    x, y, _ = drawn.drawings[1]
    first = int(np.flatnonzero(importance.stages[1].assign < 0)[0])
    row, col = divmod(first, 6)
    patch = np.asarray(to_image(drawn))[y + 4 * row + 2, x + 4 * col + 2]
    assert np.abs(patch.astype(int) - MASK).max() < 35


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
        (None, ["--images=nowhere"], "nowhere does not exist"),
        (None, ["--images="], "either --images or --data; got none"),
        (None, ["--data=digits"], "got both"),
        (None, ["--reducer=tmd"], "did you mean 'tdm'"),
        (None, ["--reducer=", "--nopoles"], "at least one method"),
        (None, ["--keep_rate=1.5"], r"keep_rate must be in \(0, 1\]; got 1.5"),
        (None, ["--keep_rate=1"], "expected a keep rate below 1"),
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
