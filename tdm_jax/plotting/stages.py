"""What methods make of one image: of its patches stage by stage, of its features by keep rate."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from tdm_jax.analysis.candidate import Candidate
from tdm_jax.analysis.costs import multiply_adds
from tdm_jax.analysis.fidelity import mean_cosine
from tdm_jax.data import DataConfig
from tdm_jax.data.device_transforms import normalise
from tdm_jax.data.pictures import Picture
from tdm_jax.errors import InputError
from tdm_jax.models.info import Stage
from tdm_jax.models.vit import VisionTransformer
from tdm_jax.plotting.figure import Figure, Panel, figure
from tdm_jax.plotting.patch_maps import SourceMap
from tdm_jax.plotting.principal_colors import PrincipalColors


class Seen(NamedTuple):
    """What a model makes of one image.

    Attributes:
      macs: the model's multiply-adds for an image.
      grid: rows and columns of patches.
      stages: the source map after each block that changed it.
      features: each patch's own at the end (`Info.patches`).
    """

    macs: int
    grid: tuple[int, int]
    stages: dict[int, SourceMap]
    features: Float[np.ndarray, "p d"]

    def source(self, layer: int | None = None) -> SourceMap | None:
        """The source map behind a block, None for the last one; None before the first stage."""
        maps = [s for at, s in self.stages.items() if layer is None or at <= layer]
        return maps[-1] if maps else None

    def tokens(self, layer: int | None = None) -> int:
        """How many tokens there are behind a block, None for the last one."""
        source = self.source(layer)
        return len(self.features) if source is None else source.tokens


def draw(picture: Picture, methods: Mapping[str, Seen], cell: int = 224) -> Figure:
    """The figure of one image: the image itself and what each method makes of it.

    The rows are the stages of the method that has fewest; the others show what they have come to by
    then.

    Args:
      picture: the image.
      methods: from left to right, by their labels.
      cell: width in pixels up to which small images are enlarged.

    Raises:
      InputError: no method changes the tokens.
    """
    layers = min((list(s.stages) for s in methods.values() if s.stages), key=len, default=None)
    if layers is None:
        raise InputError("no method reduces the tokens here; expected a keep rate below 1")
    rows = []
    for layer in layers:
        row = [_original(picture, methods)]
        for seen in methods.values():
            caption = f"{seen.tokens(layer)} tokens"
            row.append(Panel(picture.pixels, seen.source(layer), caption=caption))
        rows.append(row)
    blocks = [f"block {layer + 1}" for layer in layers]
    return figure(rows, ["original", *methods], blocks, title=picture.name, cell=cell)


def draw_features(
    picture: Picture,
    unreduced: Seen,
    runs: Mapping[str, Mapping[str, Seen]],
    cell: int = 224,
    tokens: bool = False,
) -> Figure:
    """The figure of one image's features (see `principal_colors`), a pixel of them for a patch.

    Below each method's stand the mean over patches of their cosine with the unreduced model's, and
    its cost as a share of that model's.

    Args:
      picture: the image.
      unreduced: what the unreduced model makes of it.
      runs: what the methods make of it, by the label of the row and the method's.
      cell: as for `draw`.
      tokens: also draw, to the left of each method's features, what became of the patches.

    Raises:
      InputError: the runs are not of the same methods, or the features make no colours.
    """
    colors = PrincipalColors.fit(unreduced.features, unreduced.grid)
    plain = Panel(colors(unreduced.features), caption=f"{len(unreduced.features)} tokens")
    rows = []
    for methods in runs.values():
        row = [_original(picture, methods), plain]
        for seen in methods.values():
            if tokens:
                row.append(Panel(picture.pixels, seen.source(), caption=f"{seen.tokens()} tokens"))
            alike = mean_cosine(seen.features, unreduced.features)
            caption = f"cosine {alike:.3f}, {seen.macs / unreduced.macs:.0%} of the cost"
            row.append(Panel(colors(seen.features), caption=caption))
        rows.append(row)
    labels = ["original", "unreduced"]
    for label in next(iter(runs.values())):
        labels += [label, f"{label}, features"] if tokens else [label]
    title = f"{picture.name}: patch features, three principal components as colours"
    return figure(rows, labels, list(runs), title=title, cell=cell)


def _original(picture: Picture, methods: Mapping[str, Seen]) -> Panel:
    patches = len(next(iter(methods.values())).features)
    return Panel(picture.pixels, caption=f"{patches} patches")


def look(
    candidates: Iterable[Candidate], data_config: DataConfig, pictures: Sequence[Picture]
) -> Iterator[tuple[Picture, dict[VisionTransformer, Seen]]]:
    """Runs each image through the model of each candidate; one compilation for each model."""

    def program(model: VisionTransformer) -> Callable[..., tuple[tuple[Stage, ...], Array]]:
        @jax.jit
        def run(
            variables: PyTree, image: Float[Array, "1 h w c"]
        ) -> tuple[tuple[Stage, ...], Float[Array, "p d"]]:
            output: Any = model.apply(variables, image, return_info=True)
            return output[1].stages, output[1].patches[0].astype(jnp.float32)

        return run

    programs = {one.model: (program(one.model), one.variables) for one in candidates}
    for picture in pictures:
        image = normalise(jnp.asarray(picture.pixels)[None], data_config.mean, data_config.std)
        seen = {}
        for model, (run, variables) in programs.items():
            stages, features = run(variables, image)
            macs, grid = multiply_adds(model), model.shape.grid
            maps = {s.layer: SourceMap.of(s, 0, grid) for s in stages}
            seen[model] = Seen(macs, grid, maps, np.asarray(features))
        yield picture, seen
