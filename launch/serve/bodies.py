"""From an HTTP request to the images' bytes; no more of it is read than the limits allow."""

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive

from launch.serve.limits import Limits, Refusal

MEDIA_TYPES = ("image/jpeg", "image/png", "image/webp")
FORM = "multipart/form-data"


async def files_of(request: Request, limits: Limits) -> list[tuple[str, bytes]]:
    """The images of a request with their names, which are empty where it tells none.

    Raises:
      Refusal: the body is too large, of another type, or not what its type says.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in (*MEDIA_TYPES, FORM):
        raise Refusal(415, f"expected a body of {', '.join(MEDIA_TYPES)} or {FORM}; got {kind!r}")
    length = request.headers.get("content-length", "")
    if length.isdigit():
        limits.check_body(int(length))
    request = Request(request.scope, _bounded(request.receive, limits))
    try:
        if kind != FORM:
            return [("", await request.body())]
        async with request.form(max_files=limits.images, max_fields=0) as form:
            found = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
            files = [(file.filename or "", await file.read()) for file in found]
    except HTTPException as error:
        if "Too many files" in error.detail:
            limits.check_images(limits.images + 1)
        raise Refusal(400, f"expected image files in the form: {error.detail}") from error
    except ClientDisconnect as error:
        raise Refusal(400, "the body ended early") from error
    if not files:
        raise Refusal(400, "expected image files in the form; got none")
    return files


def _bounded(receive: Receive, limits: Limits) -> Receive:
    """The same, but refuses when a body has become too large."""
    taken = 0

    async def bounded() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        limits.check_body(taken)
        return message

    return bounded
