"""Weights of learned methods under the names of their original programs."""

import re
from typing import Any

import numpy as np

from tdm_jax.errors import InputError


def stage_name(stage: int) -> str:
    """The key of a stage's weights in a method's tree."""
    return f"stage_{stage}"


def import_stages(
    reducer: Any, arrays: dict[str, np.ndarray], prefix: str, names: dict[str, str]
) -> dict[str, Any]:
    """Sorts the arrays `{prefix}.{stage}.{name}` of a PyTorch program into a tree by stage.

    Args:
      reducer: the method; each of its layers is a stage, or, where every block is one, or it has no
        layers, there are as many as the names tell.
      arrays: by original name.
      prefix: of all names.
      names: for each original name its path in a stage's tree, parts joined by "/". A linear map's
        "kernel" is transposed, PyTorch has the outputs first.

    Returns:
      Each stage's tree under "stage_0" and so on.

    Raises:
      InputError: there are more or fewer stages, or names are missing or unknown.
    """
    owner: str = reducer.title
    schedule: Any = getattr(reducer, "schedule", None)
    number = schedule and schedule.number
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.(.+)")
    matches = map(pattern.fullmatch, arrays)
    got = 1 + max((int(match[1]) for match in matches if match), default=-1)
    stages = got if number is None else number
    if got != stages:
        raise InputError(
            f"{owner}: expected weights of {stages} stages, one for each of "
            f"layers={schedule.layers!r}, named {prefix}.0.{{{', '.join(names)}}} and so on; "
            f"got {got} stages"
        )
    expected = {
        f"{prefix}.{stage}.{name}": (stage, path)
        for stage in range(stages)
        for name, path in names.items()
    }
    missing = sorted(expected.keys() - arrays.keys())
    extra = sorted(arrays.keys() - expected.keys())
    if missing or extra:
        parts = [f"{len(missing)} missing: {', '.join(missing[:4])}"] if missing else []
        parts += [f"{len(extra)} unknown: {', '.join(extra[:4])}"] if extra else []
        raise InputError(
            f"{owner}: expected weights {prefix}.0.{{{', '.join(names)}}} and so on per stage; "
            f"got {'; '.join(parts)}"
        )
    tree: dict[str, Any] = {stage_name(stage): {} for stage in range(stages)}
    for name, (stage, path) in expected.items():
        *parents, leaf = path.split("/")
        branch = tree[stage_name(stage)]
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = arrays[name].T if leaf == "kernel" else arrays[name]
    return tree
