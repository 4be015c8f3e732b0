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

from glm4v_nb.serving.engine import ENDING, where
from glm4v_nb.serving.job import Done, Failure, Job
from glm4v_nb.serving.options import is_loopback
from glm4v_nb.serving.protocol import Completion, Refusal, check_model
from glm4v_nb.serving.service import Service

log = logging.getLogger(__name__)

_BODY_SECONDS = 60
_LOOK_SECONDS = 1  # between looks at whether a client is there that has sent more than its request
_READ = ["GET", "HEAD"]
_AT_A_TIME = 2  # requests that are prepared: a picture may take a gigabyte meanwhile
# A body that is too large is read to its end and dropped, as a client that still sends hears
# nothing; but not for ever.
_DROPPED_BYTES = 256 * 2**20


def build_app(service: Service) -> FastAPI:
    """The routes: /v1/chat/completions, /v1/models, /health and /metrics.

    ``state.reading`` has the deadlines of bodies that are being read, for a service that ends.
    """
    # No pages of documentation, which load scripts from elsewhere.
    app = FastAPI(title="glm4v-nb", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.reading = reading = set()
    engine, metrics = service.engine, service.metrics
    preparing = anyio.CapacityLimiter(_AT_A_TIME)

    async def check(request: Request):
        _check_caller(request, service.key)

    checked = [Depends(check)]

    @app.exception_handler(Refusal)
    async def refuse(request: Request, error: Refusal):
        metrics.refused.labels(error.code).inc()
        log.info("refused: %d %s", error.status, error.code)  # no path, which a client may choose
        return _told(error)

    @app.exception_handler(HTTPException)
    async def not_here(request: Request, error: HTTPException):
        advice = "POST /v1/chat/completions, GET /v1/models, /health and /metrics are here."
        refusal = Refusal(error.status_code, "not_found", f"{error.detail}. {advice}")
        answer = await refuse(request, refusal)
        answer.headers.update(error.headers or {})
        return answer

    @app.api_route("/health", methods=_READ)
    async def health():
        ready = engine.alive and not engine.draining
        words = "ready" if ready else "shutting down" if engine.alive else "failed"
        return JSONResponse({"status": words}, 200 if ready else 503)

    @app.api_route("/metrics", methods=_READ, dependencies=checked)
    def measured():
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    model = {"id": service.name, "object": "model", "created": int(time.time())}
    model["owned_by"] = "glm4v-nb"

    @app.api_route("/v1/models", methods=_READ, dependencies=checked)
    async def models():
        return {"object": "list", "data": [model]}

    @app.api_route("/v1/models/{name:path}", methods=_READ, dependencies=checked)
    async def one_model(name: str):
        if not name:  # asked for with a slash at the end
            return await models()
        check_model(name, service.name)
        return model

    @app.post("/v1/chat/completions", dependencies=checked)
    async def chat(request: Request):
        begin = time.monotonic()
        engine.reserve()
        events: asyncio.Queue = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(event):
            with suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(events.put_nowait, event)

        try:
            body = await read_body(request, service.most_body_bytes, reading)
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
        job.asked = begin
        engine.submit(job)
        watcher = asyncio.create_task(_cancel_when_gone(request, engine, job))
        try:
            # Nothing is sent before the first token, so that an error still has its own status.
            first = await events.get()
            if isinstance(first, Failure):
                return _told(first.refusal)
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
                return _told(event.refusal)
            if isinstance(event, Done):
                text = "".join(texts)
                return JSONResponse(self.completion.whole(text, event.finish, event.new_tokens))
            texts.append(event.text)

    async def chunks(self, with_usage: bool):
        completion = self.completion
        yield completion.chunk({"role": "assistant", "content": ""})
        async for event in self._each():
            if isinstance(event, Failure):
                yield event.refusal.body
            elif isinstance(event, Done):
                yield completion.chunk({}, event.finish)
                if with_usage:
                    yield completion.chunk(None, usage=completion.usage(event.new_tokens))
            else:
                yield completion.chunk({"content": event.text})


def _told(error: Refusal) -> JSONResponse:
    headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
    return JSONResponse(error.body, error.status, headers)


async def _cancel_when_gone(request: Request, engine, job: Job):
    """After the body the one message that may come is that the client has hung up.

    Asked for again and again, as uvicorn reads no further where a client has sent more than its
    request, and would not see that it has hung up behind that.
    """
    gone = False
    while not gone:
        with suppress(TimeoutError):
            async with asyncio.timeout(_LOOK_SECONDS):
                gone = (await request.receive())["type"] == "http.disconnect"
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
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    right = hmac.compare_digest(given.strip().encode(), key.encode())
    if not right or scheme.lower() != "bearer":
        message = "The API key is missing or wrong. Send it as 'Authorization: Bearer KEY'."
        raise Refusal(401, "invalid_api_key", message)


async def read_body(request: Request, most: int, reading: set[asyncio.Timeout]) -> bytes:
    """The body.

    Args:
        most: bytes.
        reading: where its deadline is, while it is read.

    Raises:
        Refusal: it is too large, too slow, packed, or is not said to be JSON; its deadline was set
            to 0, as the service ends.
    """
    # Which a page of another site cannot say without asking first, and it is not answered.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = "The body is not said to be JSON. Send it with 'Content-Type: application/json'."
        raise Refusal(415, "not_json", message)
    if (packed := request.headers.get("content-encoding", "identity").lower()) != "identity":
        message = f"The body is packed ({packed[:80]}), and is not unpacked here. Send it as it is."
        raise Refusal(415, "not_json", message)
    body, size, deadline = bytearray(), 0, asyncio.timeout(_BODY_SECONDS)
    reading.add(deadline)
    try:
        async with deadline:
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
        if deadline.when() <= 0:
            raise Refusal(503, *ENDING) from None
        message = f"The body was not here after {_BODY_SECONDS} s. Send it faster, or less."
        raise Refusal(408, "too_slow", message) from None
    finally:
        reading.remove(deadline)
    if size > most:
        message = (
            f"The body is larger than {most:,} bytes. Scale the picture down: the model sees it at"
            " 1120 x 1120 pixels whatever its size; a JPEG of that takes less than a megabyte."
        )
        raise Refusal(413, "body_too_large", message)
    return bytes(body)
