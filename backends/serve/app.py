"""The routes: bodies are checked, transformers' handlers answer them, and clients that leave end their generation."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from sparsify.backends.serve.handlers import Chat, Completions, Held
from sparsify.backends.serve.refusal import Refusal, another_model
from sparsify.backends.serve.turn import Turn
from sparsify.backends.serve.words import check_chat, check_completion, parse
from sparsify.errors import first_line

_LOG = logging.getLogger("sparsify.serve")
# Bytes of a request: more tokens than models hold.
_MOST = 8 << 20


def build_app(held: Held) -> Starlette:
    """What answers for ``held``, and for nothing else."""
    listed = {"id": held.name, "object": "model", "created": 0, "owned_by": "local"}

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [listed]})

    async def model(request: Request) -> Response:
        if request.path_params["name"] != held.name:
            return _refused(another_model(request.path_params["name"], held.name))
        return JSONResponse(listed)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def completions(request: Request) -> Response:
        return await _answered(request, held, check_completion, Completions)

    async def chat(request: Request) -> Response:
        return await _answered(request, held, check_chat, Chat)

    async def elsewhere(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        do = "/v1/models, /v1/completions and /v1/chat/completions are answered"
        return _refused(Refusal(f"{request.method} {request.url.path}: {error.detail}. {do}", status=error.status_code))

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
        ],
        exception_handlers={HTTPException: elsewhere},
    )


async def _answered(
    request: Request, held: Held, check: Callable[[dict[str, Any], str], None], kind: type[Completions | Chat]
) -> Response:
    turn: Turn | None = None
    try:
        body = parse(await _body(request))
        check(body, held.name)
        held.check(body, chat=kind is Chat)
        handler = kind(held, body)
        turn = handler.turn
        identity = f"{'chatcmpl' if kind is Chat else 'cmpl'}-{uuid.uuid4().hex}"
        answer = await _while_wanted(request, turn, handler.handle_request(body, identity))
    except Refusal as error:
        return _refused(error)
    except ClientDisconnect:
        return Response(status_code=499)
    except Exception as error:  # templates, tokenizers and models raise whatever they like
        if turn is None or not turn.begun:
            made = f"This request cannot be made into tokens: {type(error).__name__}: {first_line(error)}"
            return _refused(Refusal(made))
        _LOG.error("a request failed: %s", first_line(error))
        return _refused(Refusal(f"generation failed: {first_line(error)}", status=500))
    return Streamed(answer, turn) if isinstance(answer, StreamingResponse) else answer


async def _body(request: Request) -> bytes:
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > _MOST:
            raise Refusal(f"The body is larger than {_MOST} bytes", status=413)
    return bytes(data)


async def _while_wanted(request: Request, turn: Turn, work: Awaitable[Response]) -> Response:
    """What ``work`` gives; it is cut short when the client goes away."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({answer, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            turn.cancel()
        return await answer
    finally:
        watch.cancel()
        # The server stops: nobody reads the answer any more.
        if not answer.done():
            turn.cancel()
            answer.cancel()
            with suppress(asyncio.CancelledError):
                await answer


class Streamed(StreamingResponse):
    """A stream of transformers', with the mark of its end that OpenAI's has; when it is over its turn is."""

    def __init__(self, answer: StreamingResponse, turn: Turn) -> None:
        super().__init__(self._to_the_end(answer.body_iterator), media_type="text/event-stream")
        self.turn = turn

    async def _to_the_end(self, parts: Any) -> AsyncIterator[str]:
        async with aclosing(parts):
            async for part in parts:
                yield part
        yield "data: [DONE]\n\n"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except (OSError, ClientDisconnect):  # the client has gone
            raise
        except Exception as error:
            _LOG.error("a stream broke off: %s", first_line(error))
            raise
        finally:
            # Also where the client left before a line was written, and nothing was iterated.
            self.turn.cancel()


def _refused(refusal: Refusal) -> Response:
    return JSONResponse(refusal.as_dict(), status_code=refusal.status)
