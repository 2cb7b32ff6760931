"""
The server's application: three routes, a key, limits, and no answer that leads a client astray.

| route | |
|---|---|
| `GET /health` | 200 while scoring is possible, without a key |
| `GET /v1/identity` | [`ServerFacts`] as JSON |
| `POST /v1/score` | a request and an answer of [`~trl_refplug.serving.wire`] |

Errors are JSON, `{"error": "..."}`: 400 malformed, 401 no or a wrong key, 408 too slow, 409 another reference is asked
for, 413 too large, 429 come back later (`Retry-After`), 500 the model failed, 503 going down.
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
from trl_refplug.serving.limits import Limits


class _Refusal(HTTPException):
    """An error whose connection is not used again: what is left of the body is not read."""

    def __init__(self, status: int, reason: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(status, reason, {"connection": "close", **(headers or {})})


class _LeftError(Exception):
    """The client is gone."""


def make_app(engine: Engine, *, key: str | None = None, limits: Limits | None = None) -> Starlette:
    """
    The application that serves `engine`.

    Args:
        engine ([`Engine`]): Scores; used by this application alone.
        key (`str`, *optional*): What clients have to present as a bearer token.
        limits ([`Limits`], *optional*): What a client may ask for.

    Returns:
        `Starlette`: Its `state.lost()` says whether it will not score again, because the device computes no more.
    """
    limits = limits or Limits()
    batcher = Batcher(engine.score, engine.works, token_budget=engine.token_budget, queue_tokens=limits.queue_tokens)
    facts = msgspec.json.encode(engine.facts)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await anyio.to_thread.run_sync(batcher.close)

    async def health(request: Request) -> Response:
        return _json({"status": "ok"}) if batcher.alive else _json({"error": "scoring has ended"}, 503)

    async def identity(request: Request) -> Response:
        return Response(facts, media_type="application/json")

    async def score(request: Request) -> Response:
        body = await _read(request, limits)
        try:
            wanted = wire.decode_request(body, max_rows=limits.rows, max_tokens=limits.tokens)
        except wire.TooLargeError as error:
            raise HTTPException(413, str(error)) from None
        except wire.WireError as error:
            raise HTTPException(400, str(error)) from None
        if not engine.facts.digest.startswith(wanted.identity):
            raise HTTPException(409, f"this is {engine.facts.model} with digest {engine.facts.digest}")
        refused = engine.refused(wanted.rows)
        sound = [index for index in range(len(wanted.rows)) if index not in refused]
        try:
            future = batcher.submit(wanted.client, engine.units(wanted, sound))
            answers = await _unless_left(asyncio.wrap_future(future), request)
        except QueueFullError as error:
            raise HTTPException(429, str(error), {"retry-after": str(error.retry_after)}) from None
        except ClosedError:
            raise _Refusal(503, "going down", {"retry-after": "1"}) from None
        except _LeftError:
            return Response(status_code=400)  # nobody reads it
        except Exception as error:  # the model's; it is in the log
            raise HTTPException(500, f"the model failed: {type(error).__name__}") from None
        answer = wire.ScoringAnswer(engine.facts.digest, _checked(answers, refused, len(wanted.rows)), refused)
        return Response(wire.encode_answer(answer, body))  # no content type: it would be a tenth of a small answer

    app = Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/identity", identity),
            Route("/v1/score", score, methods=["POST"]),
        ],
        middleware=[Middleware(_KeyCheck, key=key)] if key else [],
        exception_handlers={HTTPException: _error},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.lost = lambda: batcher.lost
    return app


class _KeyCheck:
    """Lets through who presents the key, before anything is read of what else they send."""

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


async def _read(request: Request, limits: Limits) -> bytes:
    """The body, as long as it comes in time and is not too long, whether or not its length is announced."""
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limits.body_bytes:
        raise _Refusal(413, f"at most {limits.body_bytes:,} bytes a request")
    body = bytearray()
    try:
        with anyio.fail_after(limits.body_seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.body_bytes:
                    raise _Refusal(413, f"at most {limits.body_bytes:,} bytes a request")
    except TimeoutError:
        raise _Refusal(408, f"the request was not there after {limits.body_seconds:g} s") from None
    except ClientDisconnect:
        raise _Refusal(400, "the request ended early") from None
    return bytes(body)


async def _unless_left(answers: asyncio.Future[Answers], request: Request) -> Answers:
    """The answers; cancelled when the client closes the connection."""
    left = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((answers, left), return_when=asyncio.FIRST_COMPLETED)
        if not answers.done():
            raise _LeftError
        return answers.result()
    finally:
        left.cancel()
        answers.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _checked(answers: Answers, refused: dict[int, str], count: int) -> list[Values | None]:
    """The values of all rows; rows for which the model has no finite number are refused, too."""
    for index, values in answers.items():
        if not np.isfinite(values).all():
            refused[index] = "the model's log-probs of it are not finite"
    return [None if index in refused else answers[index] for index in range(count)]


def _json(content: dict[str, Any], status: int = 200, headers: Any = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")


async def _error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _json({"error": error.detail}, error.status_code, error.headers)
