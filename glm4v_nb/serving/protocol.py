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
# Commas and brackets of a body, in texts too: a few megabytes of "[]," take minutes to read, and
# gigabytes, while nobody gets a token.
MOST_VALUES = 100_000
_SHOWN = 80  # characters of what a client sent, in a message
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
    model_config = ConfigDict(extra="allow")  # looked at by ``_refuse_others``


class _Text(_Part):
    type: Literal["text"]
    text: str


class _Address(_Part):
    url: str
    detail: Literal["auto", "low", "high"] | None = None  # the model has one size for all


class _Image(_Part):
    type: Literal["image_url"]
    image_url: _Address


def _parts(content):
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class _Message(_Part):
    role: Literal["system", "developer", "user", "assistant"]  # developer is the new system
    content: Annotated[
        list[Annotated[_Text | _Image, Field(discriminator="type")]],
        Field(max_length=MOST_PARTS, fail_fast=True),
        BeforeValidator(_parts),
    ]


class _StreamOptions(_Part):
    include_usage: bool = False
    include_obfuscation: bool | None = None  # no padding is sent


def _listed(stop):
    return [stop] if isinstance(stop, str) else [] if stop is None else stop


class ChatRequest(_Part):
    """The body of a request; ``max_tokens`` None: what is left of the room for one request."""

    model: str
    messages: list[_Message] = Field(min_length=1, max_length=MOST_PARTS, fail_fast=True)
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


# Values of other fields that ask for nothing; None, [] and {} do in any. The first are notes.
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
    if (values := sum(map(body.count, (b",", b"[", b"{")))) > MOST_VALUES:
        raise Refusal(
            413,
            "body_too_large",
            f"The body has {values:,} commas and brackets; at most {MOST_VALUES:,} are read. Send a"
            " part of the text or of the fields.",
        )
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        advice = "Send what https://platform.openai.com/docs/api-reference/chat describes."
        message = f"{where or 'The body'}: {first['msg'][:1000]}. {advice}"
        raise Refusal(400, "invalid_value", message, where or None) from None
    _refuse_others(request)
    check_model(request.model, model)
    if request.stream_options and not request.stream:
        message = "stream_options are for streams alone. Set stream, or leave them out."
        raise Refusal(400, "invalid_value", message, "stream_options")
    for message in request.messages:
        for part in message.content:
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


def check_model(asked: str, served: str):
    """Refusal (404) for a model of another name."""
    if asked != served:
        message = f"The model {asked[:_SHOWN]!r} is not served here. Ask for {served!r}."
        raise Refusal(404, "model_not_found", message, "model")


def _refuse_others(given: _Part, where: str = ""):
    """Refuse a field that asks for what is not served, here or further in.

    An answer that is sent back as it came has some that are null or empty.
    """
    for name, value in given.model_extra.items():
        known = () if where else _NEUTRAL.get(name, ())
        if value in (None, [], {}, *known) or (name in _ANY and not where):
            continue
        name = where + name[:_SHOWN]
        expected = f" Expected {known[0]!r} or nothing." if known else ""
        message = f"{name} is not served here.{expected} Leave {name} out."
        raise Refusal(400, "unsupported_parameter", message, name)
    for name, value in given:
        for number, one in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(one, _Part):
                place = f"{name}.{number}" if isinstance(value, list) else name
                _refuse_others(one, f"{where}{place}.")


def conversation(request: ChatRequest) -> list[dict]:
    """Its messages as the processor takes them."""
    return [
        {
            "role": "system" if message.role == "developer" else message.role,
            "content": [_plain(part) for part in message.content],
        }
        for message in request.messages
    ]


def _plain(part: _Text | _Image) -> dict:
    if part.type == "text":
        return {"type": "text", "text": part.text}
    return {"type": "image_url", "image_url": {"url": part.image_url.url}}


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
