"""What methods make of one image, stage by stage: a figure with a row for each stage."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from tdm_jax.analysis.candidate import Candidate
from tdm_jax.data import DataConfig
from tdm_jax.data.device_transforms import normalise
from tdm_jax.data.pictures import Picture
from tdm_jax.errors import InputError
from tdm_jax.models.info import Stage
from tdm_jax.plotting.figure import Figure, Panel, figure
from tdm_jax.plotting.patch_maps import SourceMap


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
    blocks = [f"block {layer + 1}" for layer in layers]
    return figure(rows, labels, blocks, title=picture.name, cell=cell)


def source_maps(
    candidates: Mapping[str, Candidate], data_config: DataConfig, pictures: Sequence[Picture]
) -> Iterator[tuple[Picture, list[Column]]]:
    """Runs each image through each candidate, by its label; one compilation each."""

    def program(candidate: Candidate) -> Callable[..., tuple[Stage, ...]]:
        @jax.jit
        def stages(variables: PyTree, image: Float[Array, "1 h w c"]) -> tuple[Stage, ...]:
            output: Any = candidate.model.apply(variables, image, return_info=True)
            return output[1].stages

        return stages

    programs = {label: program(candidate) for label, candidate in candidates.items()}
    for picture in pictures:
        image = normalise(jnp.asarray(picture.pixels)[None], data_config.mean, data_config.std)
        columns = []
        for label, candidate in candidates.items():
            grid = candidate.model.shape.grid
            stages = programs[label](candidate.variables, image)
            columns.append(Column(label, {s.layer: SourceMap.of(s, 0, grid) for s in stages}))
        yield picture, columns
