"""The Ray Serve application: `serve run launch.serve.application:build exports=<folder>,...`.

One deployment: a replica decodes, batches and computes in one process, so an image crosses no
border between them, and replicas are what is scaled. See docs/serving.md.
"""

import asyncio
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import jax
import numpy as np
import pydantic
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from jaxtyping import Float
from ray import serve
from starlette.exceptions import HTTPException
from starlette.requests import Request

from launch.serve import programs
from launch.serve.batching import Batcher
from launch.serve.bodies import files_of
from launch.serve.images import decode, transform_of
from launch.serve.levels import Policy, Thresholds
from launch.serve.limits import Limits, Refusal
from launch.serve.metrics import Counts

logger = logging.getLogger("ray.serve")


def _list(value: Any) -> Any:
    """On a command line, lists are separated by commas."""
    return value.split(",") if isinstance(value, str) else value


class Settings(pydantic.BaseModel, extra="forbid"):
    """What `build` takes, from a command line (`name=value`) or a configuration's `args`.

    Attributes:
      exports: folders, see `programs.load`.
      batch_sizes: see `programs.load`.
      batch_wait_seconds: that an idle device waits for a fuller batch.
      top_k: classes in an answer, unless a request says how many.
      lower_under_load: whether requests that ask for no keep rate get a lower one under load.
      thresholds: when they do.
      limits: of requests.
      decoders: threads that decode; by default one a core.
    """

    exports: Annotated[list[str], pydantic.BeforeValidator(_list)]
    batch_sizes: Annotated[list[int] | None, pydantic.BeforeValidator(_list)] = None
    batch_wait_seconds: float = pydantic.Field(default=0.002, ge=0)
    top_k: int = pydantic.Field(default=5, ge=1)
    lower_under_load: bool = True
    thresholds: Thresholds = Thresholds()
    limits: Limits = Limits()
    decoders: int | None = pydantic.Field(default=None, ge=1)


app = FastAPI(title="tdm_jax", docs_url=None, redoc_url=None, openapi_url=None)


@app.exception_handler(HTTPException)
async def refuse(request: Request, error: HTTPException) -> JSONResponse:
    """No such path, or method: as every other refusal."""
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


@serve.deployment(logging_config={"enable_access_log": False})
@serve.ingress(app)
class Classifier:
    """One replica: the model at all its keep rates, a queue, and what the paths answer."""

    def __init__(self, settings: Settings) -> None:
        """Compiles and warms everything; until then no request comes."""
        self._settings = settings
        self._programs = programs.load(settings.exports, settings.batch_sizes)
        manifest = self._programs[0].manifest
        self._transform, _ = transform_of(manifest)
        self._classes = manifest["model"]["num_classes"]
        self._labels = manifest["labels"]
        self._policy = Policy(len(self._programs), settings.thresholds)
        self._decoders = ThreadPoolExecutor(settings.decoders or os.cpu_count())
        self._counts = Counts()
        self._batcher = Batcher(
            [program.seconds for program in self._programs],
            lambda level, images: self._programs[level](images),
            settings.batch_wait_seconds,
            self._formed,
        )
        self._waiting = 0
        self._ready, self._compilations = time.monotonic(), 0
        jax.monitoring.register_event_duration_secs_listener(self._compiled)

    def _compiled(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        self._compilations += event == "/jax/core/compile/backend_compile_duration"

    def check_health(self) -> None:
        """For Ray, which replaces a replica that raises."""
        if not self._batcher.alive:
            raise RuntimeError("the batches have stopped")

    @app.get("/healthz")
    async def health(self) -> dict[str, Any]:
        """Whether it serves; compilations since it was ready must stay 0."""
        return {
            "status": "ok",
            "seconds": round(time.monotonic() - self._ready, 3),
            "waiting": self._waiting,
            "compilations": self._compilations,
        }

    @app.get("/metadata")
    async def metadata(self) -> dict[str, Any]:
        """What is served, and what it accepts."""
        first = self._programs[0].manifest
        return {
            "model": {key: x for key, x in first["model"].items() if key != "reducer"},
            "labels": self._labels,
            "levels": [
                {
                    "keep_rate": program.keep_rate,
                    "reducer": program.manifest["model"].get("reducer"),
                    **{key: program.manifest[key] for key in ("tokens", "multiply_adds", "dtype")},
                    "batch_seconds": {n: round(s, 5) for n, s in program.seconds.items()},
                }
                for program in self._programs
            ],
            "settings": self._settings.model_dump(exclude={"exports"}),
            "versions": first["versions"] | {"serving_jax": jax.__version__},
        }

    @app.post("/predict")
    async def predict(self, request: Request) -> JSONResponse:
        """Answers to an image or several."""
        began, status = time.perf_counter(), "aborted"  # unless it comes to an answer
        try:
            response = await self._response(request)
            status = str(response.status_code)
            return response
        finally:
            self._counts.answered(status, time.perf_counter() - began)

    async def _response(self, request: Request) -> JSONResponse:
        try:
            return JSONResponse(await self._answer(request))
        except Refusal as refusal:
            return JSONResponse({"error": str(refusal)}, refusal.status, refusal.headers)
        except Exception:
            logger.exception("a request failed")
            return JSONResponse({"error": "internal error"}, 500)

    async def _answer(self, request: Request) -> dict[str, Any]:
        limits = self._settings.limits
        level, top_k = self._asked(request)
        late = Refusal(408, f"expected the whole body within {limits.seconds:g} seconds")
        taken = 0
        try:
            async with asyncio.timeout(limits.seconds):
                files = await files_of(request, limits)
                late = Refusal(504, f"not answered within {limits.seconds:g} seconds")
                limits.check_queue(self._waiting, len(files))
                taken = len(files)
                self._wait(taken)
                if level is None:
                    level = 0
                    if self._settings.lower_under_load:
                        level = self._policy.choose(self._waiting, time.monotonic())
                rows = await self._rows(level, files)
        except TimeoutError:
            raise late from None
        finally:
            self._wait(-taken)
        return {
            "keep_rate": self._programs[level].keep_rate,
            "images": [
                {"name": name, **self._said(row, top_k)}
                for (name, _), row in zip(files, rows, strict=True)
            ],
        }

    def _asked(self, request: Request) -> tuple[int | None, int]:
        """The level and the classes that a request asks for."""
        rates = [f"{program.keep_rate:g}" for program in self._programs]
        rate = request.query_params.get("keep_rate", request.headers.get("x-keep-rate"))
        level = None
        if rate is not None:
            try:
                level = rates.index(f"{float(rate):g}")
            except ValueError:
                raise Refusal(422, f"expected a keep_rate of {', '.join(rates)}") from None
        top_k = request.query_params.get("top_k", str(self._settings.top_k))
        if not (top_k.isascii() and top_k.isdigit() and len(top_k) < 7 and int(top_k) > 0):
            raise Refusal(422, "expected a top_k of at least 1, and below a million")
        return level, int(top_k)

    def _wait(self, change: int) -> None:
        self._waiting += change
        self._counts.waiting(self._waiting)

    async def _rows(self, level: int, files: list[tuple[str, bytes]]) -> list[Any]:
        """A level's answers; the first image that is refused ends the others."""
        loop = asyncio.get_running_loop()

        async def row(place: str, data: bytes) -> Float[np.ndarray, " n"]:
            try:
                image = await loop.run_in_executor(
                    self._decoders, decode, data, self._transform, self._settings.limits
                )
            except Refusal as refusal:
                raise Refusal(refusal.status, f"{place}: {refusal}") from refusal
            return await self._batcher.answer(level, image)

        tasks = [
            asyncio.ensure_future(row(f"image {i} {name}".rstrip(), data))
            for i, (name, data) in enumerate(files)
        ]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    def _formed(self, level: int, images: int, size: int) -> None:
        self._counts.batch(self._programs[level].keep_rate, images, size)

    def _said(self, row: Float[np.ndarray, " n"], top_k: int) -> dict[str, Any]:
        if self._classes < 1:
            return {"features": row.tolist()}
        exponents = np.exp(row - row.max())
        best = np.argsort(-row, kind="stable")[:top_k].tolist()
        return {
            "top": [
                {
                    "class": i,
                    "label": None if self._labels is None else self._labels[i],
                    "probability": float(exponents[i] / exponents.sum()),
                }
                for i in best
            ]
        }


def build(args: Settings) -> serve.Application:
    """The application, for `serve run`, `serve deploy` and `ray.serve.run`."""
    # Ray's own queues only have to be longer than ours, which answers in JSON.
    many = 2 * args.limits.queue
    deployment: Any = Classifier
    return deployment.options(
        max_ongoing_requests=many,
        max_queued_requests=many,
        graceful_shutdown_timeout_s=args.limits.seconds + 10,
        graceful_shutdown_wait_loop_s=0.5,
    ).bind(args)
