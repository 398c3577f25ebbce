"""What the explorer shows, as JSON can hold it: images, answers, patches and their features."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from tdm_jax import data
from tdm_jax.analysis.candidate import Candidate
from tdm_jax.analysis.costs import multiply_adds
from tdm_jax.analysis.evaluation import Evaluation
from tdm_jax.analysis.fidelity import mean_cosine
from tdm_jax.data.pictures import Picture
from tdm_jax.models.info import Stage
from tdm_jax.plotting import colors
from tdm_jax.plotting.figure import data_url
from tdm_jax.plotting.patch_maps import DROPPED, SourceMap, as_rgb, shade_groups
from tdm_jax.plotting.principal_colors import PrincipalColors
from tdm_jax.reduction.token_state import TokenKind

_TOP = 3
_LETTERS: dict[int, str] = dict(zip((DROPPED, *TokenKind), "dkmcc", strict=True))


def explorer(
    candidates: Sequence[Candidate], pictures: Sequence[Picture], evaluation: Evaluation
) -> dict[str, Any]:
    """Runs every candidate on every picture.

    Args:
      candidates: of one transformer, the unreduced model first.
      pictures: images as the models see them, with labels.
      evaluation: runs the models.
    """
    model = candidates[0].model
    grid = model.shape.grid
    config = evaluation.data_config(model)
    names = None if config.unlabelled else data.class_names(config)
    classes = [str(i) if names is None else names[i] for i in range(model.num_classes)]
    pixels = np.stack([picture.pixels for picture in pictures])
    plain: list[tuple[Float[np.ndarray, "p d"], PrincipalColors]] = []
    methods: dict[str, list[dict[str, Any]]] = {}
    for candidate in candidates:
        logits, _, patches, stages = evaluation.explain(candidate, pixels)
        features, shares = jax.device_get((patches, jax.nn.softmax(logits, axis=-1)))
        plain = plain or [(own, PrincipalColors.fit(own, grid)) for own in features]
        rate = candidate.label.removeprefix(candidate.method).removesuffix(candidate.training)
        method = ", ".join(word for word in (candidate.method, candidate.training) if word)
        order = 1.0 if candidate.keep_rate is None else float(np.mean(candidate.keep_rate))
        if candidate.budget is not None:
            order = candidate.budget / (multiply_adds(candidates[0].model) / 1e9)
        says = shares if model.num_classes else shares[:, :0]
        methods.setdefault(method, []).append(
            {
                "rate": rate.strip(),
                "order": order,
                "stages": [stage.layer + 1 for stage in stages],
                "images": [
                    _answer(says[i], stages, i, grid) | _features(features[i], *plain[i])
                    for i in range(len(pictures))
                ],
            }
        )
    labelled = bool(model.num_classes) and not config.unlabelled
    labels = [picture.label if labelled else None for picture in pictures]
    return {
        "grid": list(grid),
        "size": list(pixels.shape[1:3]),
        "classes": {str(i): classes[i] for i in _mentioned(methods, labels)},
        "colors": [colors.hex_code(shade.rgb) for shade in colors.SHADES],
        "images": [
            {
                "url": data_url(as_rgb(picture.pixels)),
                "label": label,
                "features": data_url(colors_of(own)),
            }
            for picture, label, (own, colors_of) in zip(pictures, labels, plain, strict=True)
        ],
        "methods": [
            {"name": name, "runs": sorted(runs, key=lambda run: -run["order"])}
            for name, runs in methods.items()
        ],
    }


def _mentioned(methods: Mapping[str, list[dict[str, Any]]], labels: Sequence[Any]) -> list[int]:
    images = (image for runs in methods.values() for run in runs for image in run["images"])
    said = {name for image in images for name, _ in image["says"]}
    return sorted(said | {label for label in labels if label is not None})


def _answer(
    shares: Float[np.ndarray, " k"], stages: Sequence[Stage], index: int, grid: tuple[int, int]
) -> dict[str, Any]:
    """What a model says to one image, and what it makes of the patches."""
    best = np.argsort(-shares, kind="stable")[:_TOP]
    return {
        "says": [[int(i), round(float(shares[i]), 4)] for i in best],
        "stages": [_stage(SourceMap.of(stage, index, grid)) for stage in stages],
    }


def _features(
    features: Float[np.ndarray, "p d"], own: Float[np.ndarray, "p d"], colors_of: PrincipalColors
) -> dict[str, Any]:
    """A model's patch features as a picture, and how like the unreduced model's own they are."""
    alike = round(mean_cosine(features, own), 4)
    return {"features": data_url(colors_of(features)), "cosine": alike}


def _stage(source: SourceMap) -> dict[str, Any]:
    """One source map: each patch's token and kind, and a color for each group."""
    kinds = source.patch_kind
    grouped = np.isin(kinds, (TokenKind.MATCHED, TokenKind.CLUSTER, TokenKind.FUSED))
    labels, shades = shade_groups(source, grouped.reshape(source.grid))
    # The last one serves the label -1.
    numbers = np.array([*(colors.SHADES.index(shade) for shade in shades), -1])
    return {
        "tokens": source.tokens,
        "token": _packed(source.assign),
        "kind": "".join(_LETTERS[int(kind)] for kind in kinds),
        "color": _packed(numbers[labels].ravel()),
    }


def _packed(numbers: Int[np.ndarray, " p"]) -> str:
    """Little-endian 16-bit integers in base 64."""
    return base64.b64encode(numbers.astype("<i2").tobytes()).decode()
