"""From the body of a request to a job that fits: everything that is looked at before the model."""

from dataclasses import dataclass

from glm4v_nb.inference import Sampling
from glm4v_nb.serving import protocol
from glm4v_nb.serving.engine import Engine
from glm4v_nb.serving.job import Job
from glm4v_nb.serving.metrics import Metrics
from glm4v_nb.serving.protocol import ChatRequest, Refusal


@dataclass
class Service:
    """What answers: the engine, what prepares for it, and the limits.

    Attributes:
        name: of the model, as clients ask for it.
        processor: of the model.
        most_body_bytes: of a request.
        key: that clients must send; None: none.
        why: in words, why a request may have so many positions.
    """

    name: str
    processor: object
    engine: Engine
    metrics: Metrics
    most_body_bytes: int
    key: str | None = None
    why: str = ""

    def __post_init__(self):
        vocabulary = self.processor.tokenizer.get_vocab()
        # A token stands for no more characters than this, so a text that is longer than the context
        # whatever its tokens are is refused before they are counted.
        self._longest_token = max(map(len, vocabulary))

    def prepare(self, body: bytes, tell) -> tuple[ChatRequest, Job]:
        """Parse, tokenise, decode the picture; takes seconds at worst and no memory of cards.

        The request comes back without its messages, which hold the picture once more.

        Raises:
            Refusal: the request is wrong, or there is never room for it.
        """
        request = protocol.parse(body, self.name)
        config = self.engine.model.config
        self._refuse_endless(request, config.seq_length)
        given = {"temperature": request.temperature, "top_p": request.top_p, "seed": request.seed}
        given = {name: value for name, value in given.items() if value is not None}
        try:
            inputs = self.processor.apply_chat_template(
                protocol.conversation(request), add_generation_prompt=True
            )
        except (ValueError, TypeError) as error:
            raise Refusal(400, "invalid_value", str(error), "messages") from None
        images = len(inputs.get("pixel_values", ()))
        image_positions = images * (config.vision_config.image_tokens - 3)
        positions = inputs["input_ids"].shape[1] + image_positions
        most = self._answer_room(positions, request.max_completion_tokens or request.max_tokens)
        sampling = Sampling(most, **given)
        tokenizer = self.processor.tokenizer
        request.messages.clear()
        return request, Job(dict(inputs), positions, sampling, tuple(request.stop), tokenizer, tell)

    def _refuse_endless(self, request: ChatRequest, context: int):
        contents = [message.content for message in request.messages]
        texts = [part if isinstance(part, str) else getattr(part, "text", "")
                 for content in contents
                 for part in ([content] if isinstance(content, str) else content)]  # fmt: skip
        characters = sum(map(len, texts))
        if characters > context * self._longest_token:
            raise Refusal(
                400,
                "context_length_exceeded",
                f"The messages have {characters:,} characters, more than the model's context of"
                f" {context:,} tokens can be. Send a part of the text.",
                "messages",
            )

    def _answer_room(self, prompt: int, wanted: int | None) -> int:
        """How many tokens an answer may have; Refusal where that is none, or fewer than wanted."""
        context, room = self.engine.model.config.seq_length, self.engine.cache.capacity
        needed = prompt + (wanted or 1)
        if needed <= room:
            return wanted or room - prompt
        does = f"The prompt takes {prompt:,} positions and the answer {wanted or 1:,}, "
        advice = f" Shorten the text, or ask for at most {room - prompt:,} tokens."
        if prompt >= room:
            advice = " Shorten the text, or leave earlier messages out."
        if needed > context:
            limit = f"{needed:,} together, but the model's context is {context:,}."
            raise Refusal(400, "context_length_exceeded", does + limit + advice, "messages")
        cache = self.engine.cache
        per_position = cache.bytes // (cache.sequences * cache.capacity)
        limit = (
            f"{needed:,} together, {needed * per_position:,} bytes of cache, but this service has"
            f" room for {room:,} a request, {room * per_position:,} bytes."
        )
        raise Refusal(413, "does_not_fit", does + limit + advice, "messages")
