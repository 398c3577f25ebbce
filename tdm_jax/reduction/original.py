"""Weights of learned methods under the names of their original programs."""

import re
from typing import Any

import numpy as np

from tdm_jax.errors import InputError


def stage_name(stage: int) -> str:
    """The key of a stage's weights in a method's tree."""
    return f"stage_{stage}"


def import_stages(
    owner: str,
    arrays: dict[str, np.ndarray],
    prefix: str,
    names: dict[str, str],
    stages: int | None = None,
) -> dict[str, Any]:
    """Sorts the arrays `{prefix}.{stage}.{name}` of a PyTorch program into a tree by stage.

    Args:
      owner: the method, for messages.
      arrays: by original name.
      prefix: of all names.
      names: for each original name its path in a stage's tree, parts joined by "/". A linear map's
        "kernel" is transposed, PyTorch has the outputs first.
      stages: how many there must be; None for as many as the names tell.

    Returns:
      `{"stage_0": {...}, ...}`.

    Raises:
      InputError: names are missing or unknown.
    """
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.(.+)")
    found = {name: pattern.fullmatch(name) for name in arrays}
    if stages is None:
        stages = 1 + max((int(match[1]) for match in found.values() if match), default=0)
    expected = {
        f"{prefix}.{stage}.{name}": (stage, path)
        for stage in range(stages)
        for name, path in names.items()
    }
    missing, extra = (
        sorted(expected.keys() - arrays.keys()),
        sorted(arrays.keys() - expected.keys()),
    )
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
