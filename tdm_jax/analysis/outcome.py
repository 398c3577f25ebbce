"""What an evaluation finds, image by image: so that two can be compared on the same images."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from tdm_jax.analysis import statistics
from tdm_jax.analysis.fidelity import Fidelity
from tdm_jax.errors import InputError
from tdm_jax.files import replacing
from tdm_jax.parallel.overlap import Road


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of each image that could be read, in the order of the data.

    Attributes:
      top1, top5: 1 where the label is the likeliest class, or among the five; means where a method
        was tried several times. None without labels or without a head.
      loss: cross entropy.
      fidelity: to the unreduced model; None where nobody asked.
      images_per_second: of the evaluation, reading and decoding included; 0 where it was long ago.
      road: where its time went; None of fewer than two batches.
    """

    top1: Float[np.ndarray, " n"] | None = None
    top5: Float[np.ndarray, " n"] | None = None
    loss: Float[np.ndarray, " n"] | None = None
    fidelity: Fidelity | None = None
    images_per_second: float = 0.0
    road: Road | None = None

    @property
    def examples(self) -> int:
        """How many images."""
        values = self.top1 if self.fidelity is None else self.fidelity.cosine
        return 0 if values is None else len(values)

    def columns(
        self, unreduced: "Outcome | None" = None, by_chance: "Outcome | None" = None
    ) -> dict[str, Any]:
        """For a `Result`.

        Args:
          unreduced: of the unreduced model, on the same images; None to compare with nothing.
          by_chance: of random dropping at the same cost.
        """
        found: dict[str, Any] = {"examples": self.examples}
        if self.fidelity is not None:
            found |= self.fidelity.columns()
        if self.top1 is None:
            return found
        found |= {
            "top1_percent": 100 * float(self.top1.mean()),
            "top1_interval": statistics.of_share(self.top1),
        }
        noise = []
        for name, other in (("unreduced", unreduced), ("random", by_chance)):
            if other is None or other is self or other.top1 is None:
                continue
            low, high = statistics.of_difference(self.top1, other.top1)
            found[f"over_{name}"] = 100 * float((self.top1 - other.top1).mean())
            found[f"over_{name}_interval"] = (low, high)
            noise += [name] * (low <= 0 <= high)
        return found | ({"within_noise": " and ".join(noise)} if noise else {})

    def save(self, path: Path) -> None:
        """Writes it, whole or not at all."""
        own = {name: getattr(self, name) for name in ("top1", "top5", "loss")}
        each = {} if self.fidelity is None else self.fidelity._asdict()
        arrays = {**own, **{f"fidelity_{name}": value for name, value in each.items()}}
        with replacing(path) as beside:
            np.savez(beside, **{k: v for k, v in arrays.items() if v is not None})

    @classmethod
    def load(cls, path: Path) -> "Outcome":
        """Reads what `save` wrote.

        Raises:
          InputError: the file is damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                found: dict[str, Any] = dict(arrays)
            each: Any = [found.get(f"fidelity_{name}") for name in Fidelity._fields]
            fidelity = None if each[1] is None else Fidelity(*each)
            return cls(found.get("top1"), found.get("top5"), found.get("loss"), fidelity)
        except Exception as error:  # each damaged file fails in its own way
            raise InputError(
                f"{path} is damaged: {error}; expected a result (without the file, it is redone)"
            ) from error


def mean(outcomes: Sequence[Outcome]) -> Outcome:
    """Of several tries on the same images, the mean for each image."""
    if len(outcomes) == 1:
        return outcomes[0]
    each = [(one.top1, one.top5, one.loss, one.fidelity) for one in outcomes]
    means: Any = jax.tree.map(lambda *tries: np.mean(tries, axis=0), *each)
    return dataclasses.replace(Outcome(*means), images_per_second=outcomes[0].images_per_second)
