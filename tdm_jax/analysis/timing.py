"""How fast compiled programs run, compared in one process.

A machine's speed drifts: other work comes and goes, clocks rise and fall. So candidates take turns.
In each round every one runs for a moment, in an order that rotates from round to round, and a
speed-up is the median over the rounds of (baseline's time / own time) within a round. What slows
the machine down for a while slows down both sides of each quotient.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from tdm_jax.errors import InputError
from tdm_jax.models.casting import cast_weights
from tdm_jax.models.vit import VisionTransformer
from tdm_jax.ops.products import product

BASELINE, FASTER = "baseline", "faster"
UNCLEAR, SLOWER = "no clear gain", "slower: not worth it"


@dataclasses.dataclass(frozen=True)
class Timing:
    """How long to measure.

    Attributes:
      rounds: turns of each candidate.
      min_seconds: a turn repeats the program until about this much time has passed.
      warmup: calls of each program that are not counted.
    """

    rounds: int = 20
    min_seconds: float = 0.1
    warmup: int = 2

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.warmup < 1 or self.min_seconds < 0:
            raise InputError(
                "a measurement needs rounds >= 1, warmup >= 1 and min_seconds >= 0; got "
                f"rounds={self.rounds}, warmup={self.warmup}, min_seconds={self.min_seconds}"
            )


@runtime_checkable
class Timed(Protocol):
    """What can be measured."""

    @property
    def images(self) -> int:
        """How many images a call handles."""

    def seconds(self, repeats: int) -> float:
        """Mean time of one of `repeats` calls."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program with its arguments, ready to be called again and again.

    Attributes:
      call: runs it once and returns what it computes, perhaps before that is ready.
      images: how many images a call handles.
      compile_seconds: from the traced to the executable program.
      memory_bytes: arguments, results and temporaries on the device, by the compiler's account;
        None if it gives none.
    """

    call: Callable[[], PyTree]
    images: int
    compile_seconds: float
    memory_bytes: int | None

    def seconds(self, repeats: int) -> float:
        """Mean time of one of `repeats` calls, each from dispatch to result."""
        start = time.perf_counter()
        for _ in range(repeats):
            jax.block_until_ready(self.call())
        return (time.perf_counter() - start) / repeats


class Spread(NamedTuple):
    """A median with its quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of a sample."""
        return cls(*np.percentile(values, (25, 50, 75)).tolist())


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What was measured of one program, beside the baseline of the same run.

    Attributes:
      images: per call.
      seconds: of one call, for each round.
      baseline: the baseline's images per second in the same rounds.
    """

    images: int
    seconds: tuple[float, ...]
    baseline: tuple[float, ...]

    @property
    def latency(self) -> Spread:
        """Seconds of one call."""
        return Spread.of(self.seconds)

    @property
    def throughput(self) -> Spread:
        """Images per second."""
        return Spread.of([self.images / s for s in self.seconds])

    @property
    def speedup(self) -> Spread:
        """Own images per second over the baseline's, round by round."""
        pairs = zip(self.seconds, self.baseline, strict=True)
        return Spread.of([self.images / s / base for s, base in pairs])

    @property
    def verdict(self) -> str:
        """FASTER, UNCLEAR or SLOWER than the baseline."""
        ratio = self.speedup
        if ratio.median <= 1:
            return SLOWER
        return FASTER if ratio.low > 1 else UNCLEAR

    def row(self, *, is_baseline: bool) -> dict[str, Any]:
        """What a `Result` says of it: medians, lower and upper quartiles, and the verdict."""
        rate, ratio = self.throughput, self.speedup
        return {
            "images_per_second": rate.median,
            "images_per_second_quartiles": (rate.low, rate.high),
            "speedup": ratio.median,
            "speedup_quartiles": (ratio.low, ratio.high),
            "verdict": BASELINE if is_baseline else self.verdict,
        }


def timed_compile(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, float]:
    """Compiles a lowered program; also returns the seconds that took."""
    start = time.perf_counter()
    compiled = lowered.compile()
    return compiled, time.perf_counter() - start


def compile_forward(model: VisionTransformer, variables: PyTree, batch_size: int) -> Program:
    """A model's forward pass on one device, on a batch of noise, `batch_size` images per call.

    Its weights are in the model's type (`cast_weights`).
    """
    variables = cast_weights(variables, model.dtype)
    shape = (batch_size, *model.image_size, model.in_channels)
    images = jax.random.normal(jax.random.key(0), shape, jnp.float32)
    compiled, seconds = timed_compile(jax.jit(model.apply).lower(variables, images))
    return Program(
        lambda: compiled(variables, images), batch_size, seconds, program_bytes(compiled)
    )


def compile_product(dtype: Any) -> tuple[Program, int]:
    """One large square product on one device, and its operations, two a multiply-add."""
    # Large enough for the rate of products to be all that counts.
    side = 1024 if jax.default_backend() == "cpu" else 8192
    factor = jax.random.normal(jax.random.key(0), (side, side), dtype)
    compiled, seconds = timed_compile(jax.jit(product).lower(factor, factor))
    program = Program(lambda: compiled(factor, factor), 1, seconds, program_bytes(compiled))
    return program, 2 * side**3


def program_bytes(compiled: jax.stages.Compiled) -> int:
    """Device memory of a compiled program; a donated argument that becomes a result counts once."""
    stats: Any = compiled.memory_analysis()
    return (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
    )


def measure(
    programs: Sequence[Timed], timing: Timing = Timing(), *, baseline: int = 0
) -> tuple[Measurement, ...]:
    """Times programs that take turns.

    Args:
      programs: the candidates'.
      timing: how long.
      baseline: index of the program that the others are compared with.

    Returns:
      A measurement for each program. The baseline's speed-up over itself is exactly 1.
    """
    repeats = []
    for program in programs:
        # The first call still allocates; the others tell how long one takes.
        program.seconds(timing.warmup)
        once = program.seconds(1)
        repeats.append(max(1, round(timing.min_seconds / max(once, 1e-9))))
    seconds = np.zeros((timing.rounds, len(programs)))
    for turn in range(timing.rounds):
        for place in range(len(programs)):
            # Nobody always runs after the same neighbour has filled the caches.
            index = (place + turn) % len(programs) if turn % 2 else (turn - place) % len(programs)
            seconds[turn, index] = programs[index].seconds(repeats[index])
    rate = tuple(float(programs[baseline].images / s) for s in seconds[:, baseline])
    return tuple(
        Measurement(program.images, tuple(float(s) for s in column), rate)
        for program, column in zip(programs, seconds.T, strict=True)
    )
