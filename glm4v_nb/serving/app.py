"""The HTTP side: who may ask, how much is read, and how an answer is sent. No model here."""

import asyncio
import hmac
import json
import logging
import re
import time
from contextlib import suppress

import anyio
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from glm4v_nb.serving.engine import where
from glm4v_nb.serving.job import Done, Failure, Job
from glm4v_nb.serving.options import is_loopback
from glm4v_nb.serving.protocol import Completion, Refusal
from glm4v_nb.serving.service import Service

log = logging.getLogger(__name__)

_BODY_SECONDS = 60
_AT_A_TIME = 2  # requests that are prepared: a picture may take half a gigabyte meanwhile
# A body that is too large is read to its end and dropped, as a client that still sends hears
# nothing; but not for ever.
_DROPPED_BYTES = 256 * 2**20


def build_app(service: Service) -> FastAPI:
    """The routes: /v1/chat/completions, /v1/models, /health and /metrics."""
    # No pages of documentation, which load scripts from elsewhere.
    app = FastAPI(title="glm4v-nb", docs_url=None, redoc_url=None, openapi_url=None)
    engine, metrics = service.engine, service.metrics
    preparing = anyio.CapacityLimiter(_AT_A_TIME)

    async def check(request: Request):
        _check_caller(request, service.key)

    checked = [Depends(check)]

    @app.exception_handler(Refusal)
    async def refuse(request: Request, error: Refusal):
        metrics.refused.labels(error.code).inc()
        headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
        return JSONResponse(error.body, error.status, headers)

    @app.exception_handler(HTTPException)
    async def not_here(request: Request, error: HTTPException):
        advice = "POST /v1/chat/completions, GET /v1/models, /health and /metrics are here."
        refusal = Refusal(error.status_code, "not_found", f"{error.detail}. {advice}")
        return await refuse(request, refusal)

    @app.get("/health")
    async def health():
        ready = engine.alive and not engine.draining
        words = "ready" if ready else "shutting down" if engine.alive else "failed"
        return JSONResponse({"status": words}, 200 if ready else 503)

    @app.get("/metrics", dependencies=checked)
    def told():
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    started = int(time.time())

    @app.get("/v1/models", dependencies=checked)
    async def models():
        one = {"id": service.name, "object": "model", "created": started, "owned_by": "glm4v-nb"}
        return {"object": "list", "data": [one]}

    @app.post("/v1/chat/completions", dependencies=checked)
    async def chat(request: Request):
        engine.reserve()
        events: asyncio.Queue = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(event):
            with suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(events.put_nowait, event)

        try:
            body = await read_body(request, service.most_body_bytes)
            asked, job = await anyio.to_thread.run_sync(
                service.prepare, body, tell, limiter=preparing
            )
        except BaseException as error:
            engine.release()
            if isinstance(error, Refusal) or not isinstance(error, Exception):
                raise
            # Never the message, which may hold what was asked.
            log.error("a request failed at %s: %s", where(error), type(error).__name__)
            message = "The request could not be prepared; the log of the service says where."
            raise Refusal(500, "internal_error", message) from None
        del body
        engine.submit(job)
        watcher = asyncio.create_task(_cancel_when_gone(request, engine, job))
        try:
            # Nothing is sent before the first token, so that an error still has its own status.
            first = await events.get()
            if isinstance(first, Failure):
                raise Refusal(first.status, first.code, first.message)
            answer = _Answer(events, first, Completion(service.name, job.prompt_positions))
            if not asked.stream:
                return await answer.whole()
        except BaseException:
            engine.cancel(job)
            raise
        finally:
            if not asked.stream:
                watcher.cancel()

        async def stream():
            try:
                async for chunk in answer.chunks(asked.with_usage):
                    yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
                yield "data: [DONE]\n\n"
            finally:
                engine.cancel(job)
                watcher.cancel()

        headers = {"Cache-Control": "no-store"}
        return StreamingResponse(stream(), media_type="text/event-stream", headers=headers)

    return app


class _Answer:
    """The events of one job as a body or as a stream."""

    def __init__(self, events: asyncio.Queue, first, completion: Completion):
        self.events, self.first, self.completion = events, first, completion

    async def _each(self):
        event = self.first
        while True:
            yield event
            if isinstance(event, (Done, Failure)):
                return
            event = await self.events.get()

    async def whole(self) -> JSONResponse:
        texts = []
        async for event in self._each():
            if isinstance(event, Failure):
                raise Refusal(event.status, event.code, event.message)
            if isinstance(event, Done):
                text = "".join(texts)
                return JSONResponse(self.completion.whole(text, event.finish, event.new_tokens))
            texts.append(event.text)

    async def chunks(self, with_usage: bool):
        completion = self.completion
        yield completion.chunk({"role": "assistant", "content": ""})
        async for event in self._each():
            if isinstance(event, Failure):
                yield Refusal(event.status, event.code, event.message).body
            elif isinstance(event, Done):
                yield completion.chunk({}, event.finish)
                if with_usage:
                    yield completion.chunk(None, usage=completion.usage(event.new_tokens))
            else:
                yield completion.chunk({"content": event.text})


async def _cancel_when_gone(request: Request, engine, job: Job):
    """After the body the one message that may come is that the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    engine.cancel(job)


def _check_caller(request: Request, key: str | None):
    """Refuse a wrong key; without one, pages of the web that a browser here shows.

    Raises:
        Refusal: 401, or 403 for a name of this machine that is not its own.
    """
    if key is None:
        host = re.sub(r":\d+$", "", request.headers.get("host", ""))
        if not is_loopback(host):
            message = "Without a key only this machine may ask, at http://127.0.0.1 or localhost."
            raise Refusal(403, "foreign_host", message)
        return
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if not hmac.compare_digest(given.encode(), key.encode()):
        message = "The API key is missing or wrong. Send it as 'Authorization: Bearer KEY'."
        raise Refusal(401, "invalid_api_key", message)


async def read_body(request: Request, most: int) -> bytes:
    """The body.

    Raises:
        Refusal: it is too large, too slow, or is not said to be JSON.
    """
    # Which a page of another site cannot say without asking first, and it is not answered.
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        message = "The body is not said to be JSON. Send it with 'Content-Type: application/json'."
        raise Refusal(415, "not_json", message)
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size > most:
                    body = bytearray()
                    if size > _DROPPED_BYTES:
                        break
                else:
                    body += chunk
    except ClientDisconnect:
        raise Refusal(499, "client_gone", "The client hung up.") from None
    except TimeoutError:
        message = f"The body was not here after {_BODY_SECONDS} s. Send it faster, or less."
        raise Refusal(408, "too_slow", message) from None
    if size > most:
        message = (
            f"The body is larger than {most:,} bytes. Scale the picture down: the model sees it at"
            " 1120 x 1120 pixels whatever its size; a JPEG of that takes less than a megabyte."
        )
        raise Refusal(413, "body_too_large", message)
    return bytes(body)
