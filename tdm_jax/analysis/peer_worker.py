"""Another runtime, in a process and an environment of its own: the other end of `analysis.peers`.

Run as a script. It imports neither JAX nor this library. A question is a line of JSON on standard
input, its answer a line on standard output:

    {"runtime", "device", "threads", "models"}     {"versions"}
    {"model", "mode", "dtype", "batch_size"}       {"compile_seconds", "memory_bytes"}
    {"repeats"}                                    {"seconds"}

A model is timm's architecture with its arguments, as `checkpoint.timm` describes one; its weights
are random. Instead of an answer {"left_out"} says that a program cannot be had here, {"error"} that
something went wrong.
"""

import gc
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# OpenMP's and ONNX Runtime's threads go on spinning for up to 12 ms after a call; the next
# program's turn begins when they sleep.
_SETTLE_SECONDS = 0.03
Call = Callable[[], object]


class LeftOut(Exception):
    """A program that this runtime does not have."""


class Job(NamedTuple):
    """A program to make.

    Attributes:
      model: timm's architecture ("architecture") and its arguments ("model_args").
      mode: "forward" or "train".
      dtype: "float32" or "bfloat16".
      batch_size: images per call.
      device: "cpu" or "cuda".
      threads: on a CPU.
    """

    model: dict[str, Any]
    mode: str
    dtype: str
    batch_size: int
    device: str
    threads: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a batch: images, channels, rows, columns."""
        arguments = self.model["model_args"]
        return (self.batch_size, arguments["in_chans"], *arguments["img_size"])


def torch_program(job: Job) -> Call:
    """Timm's model in PyTorch, with its fused attention (SDPA)."""
    return _torch_program(job, compiled=False)


def torch_compile_program(job: Job) -> Call:
    """The same by `torch.compile` as it is."""
    return _torch_program(job, compiled=True)


def _torch_program(job: Job, compiled: bool) -> Call:
    import torch

    torch.set_num_threads(job.threads)
    if job.device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as JAX multiplies there
    model = _timm(job.model).to(job.device)
    if compiled:
        torch._dynamo.reset()  # beside what was compiled before this batch size would be a variable
    make = _training if job.mode == "train" else _forward
    step = make(job, model, torch.compile(model) if compiled else model)
    if job.device == "cpu":
        return step

    def call() -> None:
        step()
        torch.cuda.synchronize()

    return call


def _forward(job: Job, model: Any, run: Any) -> Call:
    import torch

    dtype = getattr(torch, job.dtype)
    model.eval().to(dtype)
    images = torch.randn(job.shape, device=job.device).to(dtype)

    def call() -> object:
        with torch.inference_mode():
            return run(images)

    return call


def _training(job: Job, model: Any, run: Any) -> Call:
    """Parameters and AdamW in float32, as in `tdm_jax.train`; without its augmentation."""
    import torch

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
    images = torch.randint(0, 256, job.shape, dtype=torch.uint8, device=job.device)
    labels = torch.zeros(job.batch_size, dtype=torch.int64, device=job.device)
    half = torch.autocast(job.device, torch.bfloat16, enabled=job.dtype == "bfloat16")

    def call() -> None:
        with half:
            answers = run(images / 255)
            # A model with a distillation token answers twice.
            answers = answers if isinstance(answers, tuple) else (answers,)
            losses = [torch.nn.functional.cross_entropy(one, labels) for one in answers]
        sum(losses).backward()
        optimizer.step()
        optimizer.zero_grad()

    return call


def onnxruntime_program(job: Job) -> Call:
    """Timm's model, exported by PyTorch for this batch size, in ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    with tempfile.TemporaryDirectory() as folder:
        session = onnxruntime.InferenceSession(
            _exported(job, folder), options, providers=["CPUExecutionProvider"]
        )
    images = {session.get_inputs()[0].name: _noise(job)}
    return lambda: session.run(None, images)


def openvino_program(job: Job) -> Call:
    """The same ONNX program in OpenVINO on the CPU, as fast for one caller as it can be."""
    import openvino

    hint = {"float32": "f32", "bfloat16": "bf16"}[job.dtype]
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": job.threads,
        "INFERENCE_PRECISION_HINT": hint,
    }
    core = openvino.Core()
    with tempfile.TemporaryDirectory() as folder:
        compiled = core.compile_model(core.read_model(_exported(job, folder)), "CPU", settings)
    if compiled.get_property("INFERENCE_PRECISION_HINT").to_string() != hint:
        raise LeftOut(f"no {job.dtype} on this processor")
    request, images = compiled.create_infer_request(), _noise(job)
    return lambda: request.infer([images])


class Runtime(NamedTuple):
    """Something that runs models.

    Attributes:
      program: makes one.
      packages: that it needs.
      modes, dtypes, devices: that it has here.
    """

    program: Callable[[Job], Call]
    packages: tuple[str, ...]
    modes: tuple[str, ...] = ("forward",)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    devices: tuple[str, ...] = ("cpu",)


_TORCH: dict[str, Any] = {"modes": ("forward", "train"), "devices": ("cpu", "cuda")}
_ONNX = ("torch", "timm", "onnx", "onnxscript")
RUNTIMES = {
    "torch": Runtime(torch_program, ("torch", "timm"), **_TORCH),
    "torch_compile": Runtime(torch_compile_program, ("torch", "timm"), **_TORCH),
    "onnxruntime": Runtime(onnxruntime_program, (*_ONNX, "onnxruntime"), dtypes=("float32",)),
    "openvino": Runtime(openvino_program, (*_ONNX, "openvino")),
}


def _timm(model: dict[str, Any]) -> Any:
    import timm

    return timm.create_model(model["architecture"], **model["model_args"])


def _exported(job: Job, folder: str) -> str:
    import torch

    path = str(Path(folder) / "model.onnx")
    images = torch.zeros(job.shape)
    torch.onnx.export(_timm(job.model).eval(), (images,), path, dynamo=True, verbose=False)
    return path


def _noise(job: Job) -> Any:
    import numpy as np

    return np.random.default_rng(0).standard_normal(job.shape, np.float32)


def check(device: str, models: Sequence[dict[str, Any]]) -> None:
    """Raises an error if PyTorch has no such device, or timm no such models."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("this PyTorch sees no GPU, and JAX computes on one")
    with torch.device("meta"):  # without weights
        for model in models:
            _timm(model)


class Worker:
    """Answers questions, with one program at a time."""

    def __init__(self, runtime: str, device: str, threads: int, models: list[dict]) -> None:
        """Imports what the runtime needs; an error says what is missing."""
        self._runtime, self._device, self._threads = RUNTIMES[runtime], device, threads
        if device not in self._runtime.devices:
            raise RuntimeError(f"expected a CPU; got {device}")
        modules = map(importlib.import_module, self._runtime.packages)
        self.versions = {one.__name__: one.__version__.partition("-")[0] for one in modules}
        check(device, models)
        self._call: Call | None = None

    def make(self, model: dict[str, Any], mode: str, dtype: str, batch_size: int) -> dict[str, Any]:
        """Makes a program and calls it once, in place of the one before."""
        for got, known in ((mode, self._runtime.modes), (dtype, self._runtime.dtypes)):
            if got not in known:
                raise LeftOut(f"no {got}")
        self._call = None
        gc.collect()
        torch = sys.modules["torch"] if self._device == "cuda" else None
        if torch:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        job = Job(model, mode, dtype, batch_size, self._device, self._threads)
        try:
            self._call = self._runtime.program(job)
            self._call()
        except Exception as error:
            if type(error).__name__ != "OutOfMemoryError":  # of PyTorch, on a GPU
                raise
            raise LeftOut("out of memory") from error
        return {
            "compile_seconds": time.perf_counter() - start,
            "memory_bytes": torch.cuda.max_memory_allocated() if torch else None,
        }

    def run(self, repeats: int) -> dict[str, float]:
        """Mean time of a call, in seconds."""
        assert self._call is not None
        start = time.perf_counter()
        for _ in range(repeats):
            self._call()
        seconds = (time.perf_counter() - start) / repeats
        time.sleep(_SETTLE_SECONDS)
        return {"seconds": seconds}


def main() -> None:
    """Answers until standard input ends."""
    # What libraries print must not come between the answers.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        worker: Worker | None = None
        for line in sys.stdin:
            question = json.loads(line)
            try:
                if worker is None:
                    worker = Worker(**question)
                    answer: dict[str, Any] = {"versions": worker.versions}
                else:
                    answer = (worker.run if "repeats" in question else worker.make)(**question)
            except LeftOut as reason:
                answer = {"left_out": str(reason)}
            except Exception as error:  # each runtime fails in its own way
                answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
