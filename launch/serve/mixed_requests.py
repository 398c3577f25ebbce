"""Requests as the world sends them, good and bad, each with the status it must be answered by."""

import asyncio
import dataclasses
import random
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from launch.serve.made_images import bomb, photograph

GONE = "gone"  # the client leaves, and no answer is expected
LOST = "no answer"


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of request.

    Attributes:
      status: that answers it, or `GONE`.
      body: bytes, or files of a form.
      type: of the body.
      query: behind /predict.
      method, path: of the request.
      share: how often it comes, beside the others.
      missing: bytes that are promised beyond the body, where the client leaves.
    """

    status: int | str
    body: bytes | tuple[bytes, ...] = b""
    type: str | None = "image/jpeg"
    query: str = ""
    method: str = "POST"
    path: str = "/predict"
    share: float = 1.0
    missing: int = 0


def kinds(metadata: dict[str, Any]) -> dict[str, Kind]:
    """All kinds, for a server that says this of itself."""
    limits = metadata["settings"]["limits"]
    jpeg, png = photograph(), photograph("PNG", (64, 96))
    rate = metadata["levels"][-1]["keep_rate"]
    side = int(limits["pixels"] ** 0.5) + 1
    thin = photograph("PNG", (1, int(limits["aspect"]) + 1))
    return {
        "a JPEG": Kind(200, jpeg, share=4),
        "a PNG": Kind(200, png, "image/png"),
        "a WebP": Kind(200, photograph("WEBP"), "image/webp"),
        "three images in a form": Kind(200, (jpeg, png, jpeg)),
        "a keep rate": Kind(200, jpeg, query=f"?keep_rate={rate:g}", share=2),
        "an empty body": Kind(400),
        "random bytes": Kind(400, random.Random(0).randbytes(5000)),
        "a truncated JPEG": Kind(400, jpeg[: len(jpeg) // 2]),
        "a truncated PNG": Kind(400, png[: len(png) // 2], "image/png"),
        "a form with one bad image of two": Kind(400, (jpeg, b"no image")),
        "an empty form": Kind(400, b"--x--\r\n", "multipart/form-data; boundary=x"),
        "a form that is none": Kind(400, b"no form", "multipart/form-data; boundary=x"),
        "a path that is none": Kind(404, path="/", method="GET", type=None),
        "GET /predict": Kind(405, method="GET", type=None),
        "a decompression bomb": Kind(413, bomb(60000, 60000), "image/png"),
        "too many pixels": Kind(413, bomb(side, side), "image/png"),
        "too many images": Kind(413, (png,) * (limits["images"] + 1)),
        "too many bytes": Kind(413, bytes(limits["body_bytes"] + 1), share=0.1),
        "no type": Kind(415, jpeg, None),
        "another type": Kind(415, jpeg, "text/plain"),
        "an unknown keep rate": Kind(422, jpeg, query="?keep_rate=0.123"),
        "a keep rate that is no number": Kind(422, jpeg, query="?keep_rate=fast"),
        "no class wanted": Kind(422, jpeg, query="?top_k=0"),
        "a number of many digits": Kind(422, jpeg, query=f"?top_k={'9' * 5000}"),
        "a thread of pixels": Kind(422, thin, "image/png"),
        "gone within the body": Kind(GONE, jpeg[: len(jpeg) // 2], missing=len(jpeg) // 2),
        "gone before the answer": Kind(GONE, jpeg),
    }


async def send(session: aiohttp.ClientSession, url: str, kind: Kind) -> int | str:
    """The status that a request was answered by, or `GONE`, or `LOST`."""
    if kind.status == GONE:
        return await _leave(url, kind)
    headers = {} if kind.type is None else {"Content-Type": kind.type}
    data: Any = kind.body
    if isinstance(kind.body, tuple):
        headers, data = {}, aiohttp.FormData()
        for i, file in enumerate(kind.body):
            data.add_field("image", file, filename=f"{i}.jpg", content_type="image/jpeg")
    elif kind.type is None:
        headers, data = {}, None if not kind.body else aiohttp.BytesPayload(kind.body)
    try:
        where = url + kind.path + kind.query
        async with session.request(kind.method, where, data=data, headers=headers) as answer:
            await answer.read()
            return answer.status
    except (aiohttp.ClientError, TimeoutError) as error:
        return f"{LOST}: {type(error).__name__}"


async def _leave(url: str, kind: Kind) -> str:
    """Sends a request, perhaps in part, and leaves without its answer."""
    assert isinstance(kind.body, bytes)
    place = urlsplit(url)
    _, writer = await asyncio.open_connection(place.hostname, place.port)
    length = len(kind.body) + kind.missing
    head = f"POST {kind.path} HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: {kind.type}\r\n"
    writer.write(f"{head}Content-Length: {length}\r\n\r\n".encode() + kind.body)
    await writer.drain()
    await asyncio.sleep(0.01)
    writer.close()
    return GONE
