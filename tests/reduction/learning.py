"""Does a learned method learn? A short training on the embedded digits, random dropping beside it.

    python tests/reduction/learning.py /tmp/learning --seeds=0,1

trains a small DeiT, then fine-tunes it with each method, and prints a table. What is measured: the
method's own objective on the test digits before and after; how much of what the trained scorer
keeps a fresh one keeps too, in the same trained transformer; how much more ink kept patches have
than all; and top-1 after, at inference.
"""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from ml_collections import ConfigDict

from tdm_jax.augment import normalise
from tdm_jax.checkpoint import load_pretrained
from tdm_jax.data import eval_batches, make_config
from tdm_jax.reduction import make_reducer
from tdm_jax.reduction.iared2 import IARED2, rewards
from tdm_jax.settings import default_config
from tdm_jax.train import train_and_evaluate

# Where each method stands in six blocks; random dropping stands at all of these places.
LAYERS = {
    "dyvit": (2, 3, 5),
    "dyvit+tdm": (2, 3, 5),
    "spvit": (2, 3, 5),
    "spvit+tdm": (2, 3, 5),
    "iared2": (0, 2, 4),
    "svite": (0,),
    "svite+tdm": (0,),
}


@dataclasses.dataclass(frozen=True)
class Setup:
    """How long to train how large a model."""

    width: int = 64
    base_steps: int = 1200
    steps: int = 450
    keep_rate: float = 0.5
    seed: int = 0

    def config(self, steps: int, rate: float) -> ConfigDict:
        config = default_config(name="digits")
        config.model = ConfigDict(
            {"name": "vit", "patch_size": 4, "width": self.width, "depth": 6, "num_heads": 2}
        )
        config.steps, config.seed = steps, self.seed
        config.optim.learning_rate = rate * 512 / 32
        config.optim.warmup_epochs = 0.1 * steps * 32 / 1437
        config.eval.every_epochs = 0.0
        config.checkpoint.every_epochs = 0.0
        return config


def train_base(setup: Setup, workdir: Path) -> float:
    """The unreduced model that all methods start from; its top-1 in percent."""
    return train_and_evaluate(setup.config(setup.base_steps, 2e-3), workdir)["top1"]


def fine_tune(setup: Setup, name: str, layers: tuple[int, ...], base: Path, workdir: Path) -> float:
    """Trains a method from the base model, which also is the teacher; its top-1 in percent."""
    config = setup.config(setup.steps, 1e-3)
    config.init_from = str(base)
    config.reducer = ConfigDict({"name": name, "keep_rate": setup.keep_rate, "layers": layers})
    config.distill.kind, config.distill.teacher = "soft", "init_from"
    # DynamicViT and SPViT bring the same term themselves: cross entropy + KL / 2.
    own = name in ("dyvit", "dyvit+tdm", "spvit", "spvit+tdm")
    config.distill.weight, config.distill.temperature = 0.0 if own else 1 / 3, 1.0
    return train_and_evaluate(config, workdir)["top1"]


@dataclasses.dataclass(frozen=True)
class Learned:
    """What a training changed: the objective, and what is kept.

    Attributes:
      before: the method's objective with the base model and fresh weights; lower is better.
      after: the same with what was trained.
      overlap: share of the patches that the trained scorer keeps which a fresh one keeps too.
      chance: the overlap of two independent choices.
      ink: mean brightness of the kept patches over that of all patches.
    """

    before: float
    after: float
    overlap: float
    chance: float
    ink: float


def measure(setup: Setup, name: str, base: Path, workdir: Path) -> Learned:
    """Compares a trained method with a fresh one on the test digits."""
    reducer = make_reducer(name, keep_rate=setup.keep_rate, layers=LAYERS[name])
    model, trained = load_pretrained(workdir / "model", reducer)
    _, fresh = load_pretrained(base / "model", reducer, fresh_reducer=True)
    unreduced, teacher = load_pretrained(base / "model")
    data = make_config({"name": "digits"})
    batch = next(iter(eval_batches(dataclasses.replace(data, batch_size=256))))
    images = normalise(jnp.asarray(batch["image"]), data.mean, data.std)
    labels = jax.nn.one_hot(jnp.asarray(batch["label"]), 10)

    @jax.jit
    def objective(params):
        rngs = {"reducer": jax.random.key(1)}
        logits, info = model.apply(params, images, train=True, return_info=True, rngs=rngs)
        if isinstance(reducer, IARED2):
            right = logits.argmax(-1) == labels.argmax(-1)
            return -rewards(right, info.carry["kept"], reducer.penalty).mean()
        answer = unreduced.apply(teacher, images, return_info=True)
        own = sum(reducer.losses(info, logits, labels, answer).values())
        return own + optax.losses.softmax_cross_entropy(logits, labels).mean()

    # What the score itself prefers, whatever becomes of the rest.
    plain = dataclasses.replace(reducer, merger=None)
    selecting = model.clone(reducer=plain)

    @jax.jit
    def kept(params):
        _, info = selecting.apply(params, images, return_info=True)
        return (info.assign >= 0) & (jnp.take_along_axis(info.kind, info.assign, 1) == 0)

    mixed = {"params": {**trained["params"], "reducer": fresh["params"]["reducer"]}}
    ours, theirs = np.asarray(kept(trained)), np.asarray(kept(mixed))
    ink = np.asarray(batch["image"], np.float64)[..., 0].reshape(-1, 7, 4, 7, 4).mean((2, 4))
    ink = ink.reshape(-1, 49)
    return Learned(
        before=float(objective(fresh)),
        after=float(objective(trained)),
        overlap=float((ours & theirs).sum() / ours.sum()),
        chance=float(theirs.mean()),
        ink=float(ink[ours].mean() / ink.mean()),
    )


def main(argv: list[str]) -> None:
    root, names = Path(argv[1]), flags.FLAGS.methods or list(LAYERS)
    print("| seed | method | layers | objective before | after | overlap (chance) | ink | top-1 |")
    print("|---|---|---|---|---|---|---|---|")
    for seed in map(int, flags.FLAGS.seeds):
        given = flags.FLAGS
        setup = Setup(seed=seed, base_steps=given.base_steps, steps=given.steps)
        folder = root / str(seed)
        print(f"| {seed} | none | | | | | | {train_base(setup, folder / 'none'):.2f} |")
        for layers in sorted({LAYERS[name] for name in names}):
            top1 = fine_tune(setup, "random", layers, folder / "none", folder / f"random{layers}")
            print(f"| {seed} | random | {layers} | | | | | {top1:.2f} |", flush=True)
        for name in names:
            top1 = fine_tune(setup, name, LAYERS[name], folder / "none", folder / name)
            it = measure(setup, name, folder / "none", folder / name)
            print(
                f"| {seed} | {name} | {LAYERS[name]} | {it.before:.3f} | {it.after:.3f} "
                f"| {it.overlap:.2f} ({it.chance:.2f}) | {it.ink:.2f} | {top1:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    flags.DEFINE_list("seeds", ["0"], "seeds of the trainings")
    flags.DEFINE_list("methods", [], "methods; all by default")
    flags.DEFINE_integer("base_steps", 1200, "steps of the base model")
    flags.DEFINE_integer("steps", 450, "steps of each fine-tuning")
    app.run(main, argv=sys.argv)
