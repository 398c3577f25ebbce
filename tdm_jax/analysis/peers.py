"""Other runtimes beside our programs: the same architecture, unreduced, in turns with them.

Each runtime is a process (`peer_worker`, by the Python of an environment that has it) that sleeps
until it is asked for its turn, so `timing.measure` treats its program as any other. Its model is
timm's, as `checkpoint.timm` describes ours, with random weights: the same arrays and products.
"""

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from tdm_jax.analysis import environment
from tdm_jax.analysis.timing import FASTER, Measurement
from tdm_jax.checkpoint.timm import timm_config, to_timm
from tdm_jax.errors import InputError, unknown
from tdm_jax.models.vit import VisionTransformer

PEERS = {
    "torch": "PyTorch",
    "torch_compile": "torch.compile",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
}
WORKER = Path(__file__).with_name("peer_worker.py")
SLOWER, UNCLEAR = "slower", "no clear difference"
_DEVICES = {"cpu": "cpu", "gpu": "cuda"}
_PATIENCE = 5.0  # seconds for a process to end by itself


class PeerProgram(NamedTuple):
    """What `timing.measure` needs of a program, asked of a process.

    Attributes:
      peer: whose process.
      images: how many images a call handles.
      compile_seconds: from timm's model to the first answer.
      memory_bytes: the most that was taken of a GPU; None on a CPU.
    """

    peer: "Peer"
    images: int
    compile_seconds: float
    memory_bytes: int | None

    def seconds(self, repeats: int) -> float:
        """Mean time of one of `repeats` calls, by the process's own clock."""
        return self.peer.ask(repeats=repeats)["seconds"]


class Peer:
    """A runtime's process."""

    def __init__(self, name: str, python: str) -> None:
        """Starts it.

        Raises:
          InputError: the runtime is none of `PEERS`, or there is no such program as `python`.
        """
        if name not in PEERS:
            raise unknown("peer", name, PEERS)
        self.label = PEERS[name]
        self.versions: dict[str, str] = {}
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115
        try:
            # Isolated: neither our packages nor the modules beside the script are its own.
            self._process = subprocess.Popen(
                [python, "-I", str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                text=True,
            )
        except OSError as error:
            self._said.close()
            raise InputError(f"--peers_python: expected a Python; got {python}: {error}") from error

    def send(self, **question: Any) -> None:
        """Asks without waiting."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the answer will say that it has ended
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Waits for the answer.

        Raises:
          InputError: the process failed or ended.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._said.seek(0)
            last = self._said.read().strip().rpartition("\n")[2][:200]
            raise InputError(f"{self.label}: its process ended with code {code}: {last}")
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError as error:
            raise InputError(f"--peers_python: expected a Python; it said {line!r}") from error
        if "error" in answer:
            raise InputError(f"{self.label}: {answer['error']}")
        return answer

    def ask(self, **question: Any) -> dict[str, Any]:
        """Asks and waits for the answer; errors as `answer`."""
        self.send(**question)
        return self.answer()

    def program(
        self, model: VisionTransformer, mode: str, dtype: str, batch_size: int
    ) -> PeerProgram | str:
        """The program that is made of a model, which replaces the one before it.

        Returns:
          The program; or why this runtime has none: it does not train, lacks the type, or the
          device's memory is too small.

        Raises:
          InputError: the runtime failed.
        """
        answer = self.ask(model=describe(model), mode=mode, dtype=dtype, batch_size=batch_size)
        return answer.get("left_out") or PeerProgram(self, batch_size, **answer)

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._said.close()


def describe(model: VisionTransformer) -> dict[str, Any]:
    """A model's architecture as timm has it, and its arguments there.

    Raises:
      InputError: timm has none that computes the same.
    """
    images = jnp.zeros((1, *model.image_size, model.in_channels))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    # Names and shapes are what matters, so no weights are made.
    params = {
        path: np.broadcast_to(np.float32(0), leaf.shape)
        for path, leaf in traverse_util.flatten_dict(shapes, sep="/").items()
    }
    config = timm_config(to_timm(model, params)[0])
    return {key: config[key] for key in ("architecture", "model_args")}


@contextlib.contextmanager
def started(
    names: Sequence[str], python: str | None, models: Sequence[VisionTransformer]
) -> Iterator[list[Peer]]:
    """Runtimes that are ready for some models; their processes end with the context.

    Args:
      names: of `PEERS`; may be empty.
      python: of the environment that has them.
      models: unreduced ones that they are going to run.

    Raises:
      InputError: a name is unknown, the environment lacks a package, or a model cannot be had.
    """
    if names and not python:
        raise InputError("--peers: expected --peers_python, a Python that has them; got none")
    if names and jax.default_backend() not in _DEVICES:
        raise InputError(f"--peers: expected a CPU or a GPU; got {jax.default_backend()}")
    described = [describe(model) for model in models] if names else []
    with contextlib.ExitStack() as stack:
        peers: list[Peer] = []
        for name in names:
            peers.append(Peer(name, str(python)))
            stack.callback(peers[-1].close)
        for name, peer in zip(names, peers, strict=True):
            peer.send(
                runtime=name,
                device=_DEVICES[jax.default_backend()],
                threads=environment.describe()["cores"],
                models=described,
            )
        for peer in peers:
            peer.versions = peer.answer()["versions"]
        yield peers


def verdict(measured: Measurement) -> str:
    """FASTER than ours without reduction, SLOWER, or UNCLEAR."""
    ratio = measured.speedup
    if ratio.low > 1:
        return FASTER
    return SLOWER if ratio.high < 1 else UNCLEAR
