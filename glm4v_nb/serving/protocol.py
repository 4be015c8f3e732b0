"""OpenAI's chat completions: what a request may ask, and the shapes of answers and of errors.

What is not done here is refused by name, unless it is given the value that means "do without".
Source of the shapes: https://platform.openai.com/docs/api-reference/chat
"""

import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)

MOST_STOPS = 4  # as OpenAI's
MOST_PARTS = 10_000  # more than any context takes, and soon counted
Text = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Count = Annotated[int, Field(strict=True, ge=1)]


class Refusal(Exception):
    """An error that the client is told, in OpenAI's shape.

    Args:
        status: of HTTP: 400 wrong, 401 no key, 413 too large, 429 too many, 503 not now.
        code: one word for programs; the reason in the metrics, too.
        message: what is wrong, what was expected and what to do.
        parameter: the field of the request.
    """

    def __init__(self, status: int, code: str, message: str, parameter: str | None = None):
        super().__init__(message)
        self.status, self.code, self.message, self.parameter = status, code, message, parameter

    @property
    def body(self) -> dict:
        kinds = {401: "authentication_error", 429: "rate_limit_error", 404: "not_found_error"}
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": self.message, "type": kinds.get(self.status, kind)}
        return {"error": {**error, "param": self.parameter, "code": self.code}}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Text(_Part):
    type: Literal["text"]
    text: str


class _Address(_Part):
    url: str
    detail: Literal["auto", "low", "high"] | None = None  # the model has one size for all


class _Image(_Part):
    type: Literal["image_url"]
    image_url: _Address


class _Message(_Part):
    role: Literal["system", "user", "assistant"]
    content: (
        str
        | Annotated[
            list[Annotated[_Text | _Image, Field(discriminator="type")]],
            Field(max_length=MOST_PARTS),
        ]
    )


class _StreamOptions(_Part):
    include_usage: bool = False
    include_obfuscation: bool | None = None  # no padding is sent


def _listed(stop):
    return [stop] if isinstance(stop, str) else [] if stop is None else stop


class ChatRequest(BaseModel):
    """The body of a request; ``max_tokens`` None: what is left of the room for one request."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[_Message] = Field(min_length=1, max_length=MOST_PARTS)
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[list[Text], Field(max_length=MOST_STOPS), BeforeValidator(_listed)] = []
    stream: bool | None = None
    stream_options: _StreamOptions | None = None

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


# Values of other fields that ask for nothing; None asks for nothing in any. The first are notes.
_ANY = ("user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier")
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "store": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}


def parse(body: bytes, model: str) -> ChatRequest:
    """The request in a body.

    Raises:
        Refusal: no JSON, a wrong value, a field that is not served, another model.
    """
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "The body"
        advice = "Send what https://platform.openai.com/docs/api-reference/chat describes."
        message = f"{where}: {first['msg']}. {advice}"
        raise Refusal(400, "invalid_value", message, where) from None
    for name, value in (request.model_extra or {}).items():
        if value is None or name in _ANY or value in _NEUTRAL.get(name, ()):
            continue
        expected = f" Expected {_NEUTRAL[name][0]!r} or nothing." if name in _NEUTRAL else ""
        message = f"{name} is not served here.{expected} Leave {name} out."
        raise Refusal(400, "unsupported_parameter", message, name)
    if request.model != model:
        message = f"The model {request.model[:80]!r} is not served here. Ask for {model!r}."
        raise Refusal(404, "model_not_found", message, "model")
    if request.stream_options and not request.stream:
        message = "stream_options are for streams alone. Set stream, or leave them out."
        raise Refusal(400, "invalid_value", message, "stream_options")
    for message in request.messages:
        for part in message.content if isinstance(message.content, list) else ():
            if part.type == "image_url" and not part.image_url.url.startswith("data:"):
                raise Refusal(
                    400,
                    "image_not_inline",
                    "An image_url is no data: URL. Expected data:image/png;base64,… with the"
                    " picture itself: no address is fetched and no file is opened for a client."
                    " Read the picture and send its base64.",
                    "messages",
                )
    return request


def conversation(request: ChatRequest) -> list[dict]:
    """Its messages as the processor takes them."""
    return [message.model_dump(exclude={"content": {"__all__": {"image_url": {"detail"}}}})
            if isinstance(message.content, list) else message.model_dump()
            for message in request.messages]  # fmt: skip


class Completion:
    """Names and dates the pieces of one answer."""

    def __init__(self, model: str, prompt_tokens: int):
        self.prompt_tokens = prompt_tokens
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time())}
        self.head["model"] = model

    def usage(self, new_tokens: int) -> dict:
        both = {"prompt_tokens": self.prompt_tokens, "completion_tokens": new_tokens}
        return {**both, "total_tokens": sum(both.values())}

    def whole(self, text: str, finish: str, new_tokens: int) -> dict:
        """The body of an answer that is not streamed."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        usage = self.usage(new_tokens)
        return {**self.head, "object": "chat.completion", "choices": [choice], "usage": usage}

    def chunk(self, delta: dict | None, finish: str | None = None, usage: dict | None = None):
        """One piece of a stream; ``delta`` None: the one at the end that has only the usage."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        choices = [] if delta is None else [choice]
        chunk = {**self.head, "object": "chat.completion.chunk", "choices": choices}
        return chunk if usage is None else {**chunk, "usage": usage}
