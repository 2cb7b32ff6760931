"""
The ASGI application of the server, with three routes.

| route | |
|---|---|
| `GET /health` | 200 while scoring is possible; needs no key |
| `GET /v1/identity` | [`ServedModel`] as JSON |
| `POST /v1/score` | a request and an answer of [`~trl_refplug.serving.wire`] |

Errors are JSON, `{"error": "..."}`: 400 malformed, 401 wrong or missing key, 408 sent too slowly, 409 the server has
another reference than the one asked for, 413 too large, 429 queue is full (try again after `Retry-After`), 500 the
model failed, 503 shutting down.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import msgspec
import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from trl_refplug.rows import Values
from trl_refplug.serving import wire
from trl_refplug.serving.batcher import Answers, Batcher, ClosedError, QueueFullError
from trl_refplug.serving.engine import Engine
from trl_refplug.serving.server_limits import ServerLimits


class _Refusal(HTTPException):
    """An error after which the connection is closed, because the rest of the body is not read."""

    def __init__(self, status: int, reason: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(status, reason, {"connection": "close", **(headers or {})})


class _ClientLeftError(Exception):
    """The client has closed the connection."""


def make_app(engine: Engine, *, key: str | None = None, limits: ServerLimits | None = None) -> Starlette:
    """
    The application that serves `engine`.

    Args:
        engine ([`Engine`]): Scores the rows. Nothing else may use it meanwhile.
        key (`str`, *optional*): The key that clients have to send as a bearer token.
        limits ([`ServerLimits`], *optional*): What clients may ask for.

    Returns:
        `Starlette`: The application. Its `state.device_lost()` says whether the device has stopped working for good.
    """
    limits = limits or ServerLimits()
    batcher = Batcher(
        engine.score, engine.device_works, token_budget=engine.token_budget, max_queued_tokens=limits.max_queued_tokens
    )
    served_model = msgspec.json.encode(engine.served_model)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await anyio.to_thread.run_sync(batcher.close)

    async def health(request: Request) -> Response:
        return _json({"status": "ok"}) if batcher.alive else _json({"error": "scoring has ended"}, 503)

    async def identity(request: Request) -> Response:
        return Response(served_model, media_type="application/json")

    async def score(request: Request) -> Response:
        body = await _read_body(request, limits)
        try:
            wanted = wire.decode_request(body, max_rows=limits.max_rows, max_tokens=limits.max_tokens)
        except wire.TooLargeError as error:
            raise HTTPException(413, str(error)) from None
        except wire.WireError as error:
            raise HTTPException(400, str(error)) from None
        if not engine.served_model.digest.startswith(wanted.identity):
            raise HTTPException(409, f"this is {engine.served_model.model} with digest {engine.served_model.digest}")
        refused = engine.refusals(wanted.rows)
        sound = [index for index in range(len(wanted.rows)) if index not in refused]
        try:
            future = batcher.submit(wanted.client, engine.work_units(wanted, sound))
            answers = await _answers_unless_client_leaves(asyncio.wrap_future(future), request)
        except QueueFullError as error:
            raise HTTPException(429, str(error), {"retry-after": str(error.retry_after)}) from None
        except ClosedError:
            raise _Refusal(503, "going down", {"retry-after": "1"}) from None
        except _ClientLeftError:
            return Response(status_code=400)  # nobody will read this answer
        except Exception as error:  # an error of the model, which the batcher has logged
            raise HTTPException(500, f"the model failed: {type(error).__name__}") from None
        answer = wire.ScoringAnswer(
            engine.served_model.digest, _refuse_non_finite(answers, refused, len(wanted.rows)), refused
        )
        return Response(wire.encode_answer(answer, body))  # a content type would add a tenth to a small answer

    app = Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/identity", identity),
            Route("/v1/score", score, methods=["POST"]),
        ],
        middleware=[Middleware(_KeyCheck, key=key)] if key else [],
        exception_handlers={HTTPException: _error_response},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.device_lost = lambda: batcher.device_lost
    return app


class _KeyCheck:
    """Middleware that refuses requests without the key, before it reads any of their body."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._expected = b"Bearer " + key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            given = [value for name, value in scope["headers"] if name == b"authorization"]
            if not (len(given) == 1 and hmac.compare_digest(given[0], self._expected)):
                headers = {"www-authenticate": "Bearer", "connection": "close"}
                await Response(status_code=401, headers=headers)(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def _read_body(request: Request, limits: ServerLimits) -> bytes:
    """Read the body of a request. Refuse it if it is too long, announced or not, or comes too slowly."""
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limits.max_body_bytes:
        raise _Refusal(413, f"at most {limits.max_body_bytes:,} bytes a request")
    body = bytearray()
    try:
        with anyio.fail_after(limits.body_timeout):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.max_body_bytes:
                    raise _Refusal(413, f"at most {limits.max_body_bytes:,} bytes a request")
    except TimeoutError:
        raise _Refusal(408, f"the request was not there after {limits.body_timeout:g} s") from None
    except ClientDisconnect:
        raise _Refusal(400, "the request ended early") from None
    return bytes(body)


async def _answers_unless_client_leaves(answers: asyncio.Future[Answers], request: Request) -> Answers:
    """Wait for the answers, and cancel them if the client closes the connection first."""
    left = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait((answers, left), return_when=asyncio.FIRST_COMPLETED)
        if not answers.done():
            raise _ClientLeftError
        return answers.result()
    finally:
        left.cancel()
        answers.cancel()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _refuse_non_finite(answers: Answers, refused: dict[int, str], count: int) -> list[Values | None]:
    """The log-probs of all rows, `None` for refused ones. Rows with a log-prob that is not finite are refused, too."""
    for index, values in answers.items():
        if not np.isfinite(values).all():
            refused[index] = "the model's log-probs of it are not finite"
    return [None if index in refused else answers[index] for index in range(count)]


def _json(content: dict[str, Any], status: int = 200, headers: Any = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")


async def _error_response(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _json({"error": error.detail}, error.status_code, error.headers)
