"""Does a learned method learn? A short training on the embedded digits, random dropping beside it.

    python -m tests.reduction.learning /tmp/learning --seeds=0,1

trains a small transformer, fine-tunes it with each method under the teaching of the unreduced
model, and prints a table. Methods without weights of their own that must be trained all the same,
Evo-ViT and A-ViT, are in it too. The columns:

- objective, before and after: what the method minimises, on the test digits in training's draws,
  with the base model and fresh weights, and as trained. Cross entropy and the method's own losses;
  for IA-RED2 (without TDM) its reward, negated; for A-ViT the ponder cost, in blocks.
- overlap: share of what the method keeps that a fresh scorer would keep too in the same trained
  transformer (without own weights: that the base model would keep); the chance of it in brackets.
- ink, before and after: brightness of the kept patches over that of all patches.
- top-1 in percent of the fine-tuned model, and of one with random dropping that was trained the
  same way, with as many tokens in the same blocks (for A-ViT as many as it kept on average).

Random dropping stands behind its block's attention, as Top-K does. In block 0 it so has seen every
patch once, which SViTE+ and IA-RED2 have not.

"Kept" is what goes through the last stage for itself; by A-ViT a patch is kept as often as it has
gone through a block; a soft method keeps the shares of the patches in the clusters of its first
stage. Sinkhorn hands out all patches alike, so its ink is 1.
"""

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from ml_collections import ConfigDict

from tdm_jax.checkpoint import load_pretrained
from tdm_jax.data import eval_batches, make_config
from tdm_jax.data.device_transforms import normalise
from tdm_jax.ops.gathering import gather_tokens
from tdm_jax.reduction import Reducer, make_reducer
from tdm_jax.reduction.methods.avit import AViT
from tdm_jax.reduction.methods.iared2 import rewards
from tdm_jax.reduction.original_weights import stage_name
from tdm_jax.reduction.soft_clusters import SoftClusters
from tdm_jax.reduction.token_state import TokenKind
from tdm_jax.training.config import default_config
from tdm_jax.training.loop import train_and_evaluate

FLAGS = flags.FLAGS
DEPTH, PATCHES = 6, 49
# Where each method stands in the six blocks.
LAYERS = {
    "dyvit": (2, 3, 5),
    "dyvit+tdm": (2, 3, 5),
    "spvit": (2, 3, 5),
    "spvit+tdm": (2, 3, 5),
    "svite": (0,),
    "svite+tdm": (0,),
    "iared2": (0, 2, 4),
    "iared2+tdm": (0, 2, 4),
    "sinkhorn": (2, 3, 5),
    "patchmerger": (2, 3, 5),
    "sit": (2, 3, 5),
    "evovit": (2, 4),
}
# The authors' gate and weights are for DeiT's channels and for weeks, not for these few steps.
AVIT = {"scale": 4.0, "center": 4.0, "ponder_weight": 0.02}
NAMES = (*LAYERS, "avit")


def settings(name: str) -> dict[str, Any]:
    """For `make_reducer`."""
    return dict(AVIT) if name == "avit" else {"keep_rate": 0.5, "layers": LAYERS[name]}


@dataclasses.dataclass(frozen=True)
class Setup:
    """How long to train, from which seed, and where."""

    root: Path
    seed: int
    base_steps: int
    steps: int

    @property
    def base(self) -> Path:
        """Where the unreduced model is that all methods start from."""
        return self.root / str(self.seed) / "none"

    def config(self, steps: int, rate: float) -> ConfigDict:
        config = default_config(name="digits")
        config.model = ConfigDict(
            {"name": "vit", "patch_size": 4, "width": 64, "depth": DEPTH, "num_heads": 2}
        )
        config.steps, config.seed = steps, self.seed
        config.optim.learning_rate = rate * 512 / 32
        config.optim.warmup_epochs = 0.1 * steps * 32 / 1437
        config.eval.every_epochs = 0.0
        config.checkpoint.every_epochs = 0.0
        return config

    def train_base(self) -> float:
        """Trains the unreduced model; its top-1 in percent."""
        return train_and_evaluate(self.config(self.base_steps, 2e-3), self.base)["top1"]

    def fine_tune(self, name: str, own: dict[str, Any]) -> tuple[float, Path]:
        """Trains a method from the base model, which also is the teacher; top-1, and where."""
        config = self.config(self.steps, 1e-3)
        config.init_from = str(self.base)
        config.reducer = ConfigDict({"name": name, **own})
        config.distill.kind, config.distill.teacher = "soft", "init_from"
        # DynamicViT and SPViT bring the same term themselves: cross entropy + KL / 2.
        brings = name.removesuffix("+tdm") in ("dyvit", "spvit")
        config.distill.weight, config.distill.temperature = 0.0 if brings else 1 / 3, 1.0
        where = "-".join(map(str, (*own.get("layers", ()), *own.get("counts", ()))))
        workdir = self.base.parent / f"{name}_{where}"
        return train_and_evaluate(config, workdir)["top1"], workdir


@dataclasses.dataclass(frozen=True)
class Learned:
    """What a training changed; the columns of the table, as pairs (before, after)."""

    objective: tuple[float, float]
    overlap: float
    chance: float
    ink: tuple[float, float]
    counts: tuple[int, ...]  # Patch tokens in the MLP of each block.


def measure(name: str, base: Path, workdir: Path) -> Learned:
    """Compares a trained method with a fresh one on the test digits."""
    reducer = make_reducer(name, **settings(name))
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
        if name == "avit":
            return (info.carry["depth"] + info.carry["remainder"]).mean()
        if name == "iared2":
            right = logits.argmax(-1) == labels.argmax(-1)
            return -rewards(right, info.carry["kept"], reducer.importance.penalty).mean()
        answer = unreduced.apply(teacher, images, return_info=True)
        own = sum(reducer.losses(info, logits, labels, answer).values())
        return own + optax.losses.softmax_cross_entropy(logits, labels).mean()

    # What the score itself prefers, whatever becomes of the rest.
    alone = make_reducer(name.removesuffix("+tdm"), **settings(name))
    select = jax.jit(functools.partial(kept, model.clone(reducer=alone), images=images))
    rival = fresh
    if reducer.learned:
        rival = {"params": {**trained["params"], "reducer": fresh["params"]["reducer"]}}
    first, learned, fresh_scorer = (
        np.asarray(select(params)) for params in (fresh, trained, rival)
    )
    shuffled = np.random.default_rng(0).permuted(fresh_scorer, axis=1)
    ink = np.asarray(batch["image"], np.float64)[..., 0].reshape(-1, 7, 4, 7, 4).mean((2, 4))
    ink = ink.reshape(-1, PATCHES, 1)
    counts = tuple(block.mlp for block in model.schedule)
    if isinstance(reducer, AViT):
        depth = learned.sum(axis=2)
        counts = tuple(round((depth > layer).sum(axis=1).mean()) for layer in range(DEPTH))
    return Learned(
        objective=(float(objective(fresh)), float(objective(trained))),
        overlap=overlap(learned, fresh_scorer),
        chance=overlap(learned, shuffled),
        ink=tuple(float((w * ink).sum() / w.sum() / ink.mean()) for w in (first, learned)),
        counts=tuple(max(count, 1) for count in counts),
    )


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """What two distributions [b, p, m] over an image's patches have in common."""
    one, other = (w / w.sum(axis=(1, 2), keepdims=True) for w in (one, other))
    return float(np.minimum(one, other).sum(axis=(1, 2)).mean())


def kept(model: Any, params: Any, images: jax.Array) -> jax.Array:
    """How much a method keeps of each patch, [b, p, 1], or [b, p, m] in each of m clusters."""
    reducer = model.reducer
    if isinstance(reducer, SoftClusters):
        layer = reducer.schedule.layers[0]
        watched = model.clone(reducer=Watch(layer=layer))
        _, info = watched.apply(params, images, return_info=True)
        pooling = reducer.shares.module(model.schedule[layer].out)
        own = params["params"]["reducer"][stage_name(0)]
        return pooling.apply({"params": own}, info.carry["tokens"])[0]
    _, info = model.apply(params, images, return_info=True)
    if isinstance(reducer, AViT):
        return info.carry["depth"][:, info.prefix :, None]
    stage = next(stage for stage in info.stages if stage.layer == reducer.schedule.layers[-1])
    alone = gather_tokens(stage.kind, jnp.maximum(stage.assign, 0)) == TokenKind.KEPT
    return ((stage.assign >= 0) & alone)[..., None].astype(jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watch(Reducer):
    """Remembers the tokens that reach a block."""

    layer: int

    def before_block(self, state: Any, context: Any) -> Any:
        if context.layer != self.layer:
            return state
        return state.replace(carry={"tokens": state.tokens})


def random_beside(setup: Setup, counts: tuple[int, ...]) -> float:
    """Top-1 of random dropping with as many tokens in the MLP of each block."""
    before = (PATCHES, *counts[:-1])
    layers = [i for i in range(DEPTH) if counts[i] < before[i]]
    own = {"layers": tuple(layers), "counts": tuple(counts[i] for i in layers)}
    return setup.fine_tune("random", own)[0]


def main(argv: list[str]) -> None:
    print("| seed | method | objective | after | overlap (chance) | ink | after | top-1 | random |")
    print("|---|---|---|---|---|---|---|---|---|")
    for seed in map(int, FLAGS.seeds):
        setup = Setup(Path(argv[1]), seed, FLAGS.base_steps, FLAGS.steps)
        print(f"| {seed} | none | | | | | | {setup.train_base():.2f} | |", flush=True)
        for name in FLAGS.methods:
            top1, workdir = setup.fine_tune(name, settings(name))
            it = measure(name, setup.base, workdir)
            beside = random_beside(setup, it.counts)
            print(
                f"| {seed} | {name} | {it.objective[0]:.3f} | {it.objective[1]:.3f} "
                f"| {it.overlap:.2f} ({it.chance:.2f}) | {it.ink[0]:.2f} | {it.ink[1]:.2f} "
                f"| {top1:.2f} | {beside:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    flags.DEFINE_list("seeds", ["0"], "seeds of the trainings")
    flags.DEFINE_list("methods", list(NAMES), "methods; all by default")
    flags.DEFINE_integer("base_steps", 1200, "steps of the base model")
    flags.DEFINE_integer("steps", 300, "steps of each fine-tuning")
    app.run(main, argv=sys.argv)
