"""Answers to conversations: ``generate`` for a whole one, ``stream`` for one that comes in pieces.

A conversation is the list of messages of ``model.chat``; its image stays in view for every later
turn, because the whole conversation is the prompt each time. Nothing here depends on where the
weights are: inputs go to the device of the embedding, hooks of accelerate carry them on.
"""

import queue
import threading
import time
from dataclasses import dataclass

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from glm4v_nb.cleanup import clear_frames
from glm4v_nb.inference import decoding
from glm4v_nb.model.chat import is_batch
from glm4v_nb.parallel import told
from glm4v_nb.placement import input_device

# Below it the likeliest token has all of the probability, and logits are divided to infinity.
LEAST_TEMPERATURE = 1e-5
# Processes that share a model ask each other so often whether one of them has cancelled.
TOKENS_BETWEEN_RANKS = 8


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: most tokens of an answer, at least 1.
        temperature: 0 takes the likeliest token each time; up to 2.
        top_p: choose among the likeliest tokens that together have this probability, above 0 to 1.
        seed: for the same choice again; None draws anew.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self):
        if isinstance(self.max_new_tokens, bool) or not isinstance(self.max_new_tokens, int):
            raise TypeError(f"max_new_tokens is {self.max_new_tokens!r}; expected a whole number.")
        for name, right, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature <= 2, "from 0 (always the likeliest token) to 2"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
        ):
            if not right:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected {expected}.")

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn, and not the likeliest taken each time."""
        return self.temperature >= LEAST_TEMPERATURE

    def arguments(self) -> dict:
        """As arguments of transformers' ``generate``."""
        # Overwrites the sampling defaults that a checkpoint's generation_config.json may carry.
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        if not self.draws:
            drawn = dict.fromkeys(drawn)
        drawn |= {"do_sample": self.draws, "return_dict_in_generate": False}
        return {"max_new_tokens": self.max_new_tokens, **drawn}


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: without special tokens and surrounding white space.
        finish: "end" (the model ended it), "length" (``max_new_tokens`` reached) or "cancelled".
        prompt_tokens: positions of the prompt, the image's (1602 at full size) among them.
        new_tokens: tokens generated, the closing one among them.
        first_token_seconds: from the start to the first token, preprocessing included.
        seconds: in all.
    """

    text: str
    finish: str
    prompt_tokens: int
    new_tokens: int
    first_token_seconds: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Speed of the tokens after the first; 0 with fewer than two."""
        return _speed(self.new_tokens, self.seconds - self.first_token_seconds)


def _speed(new_tokens: int, later_seconds: float) -> float:
    return (new_tokens - 1) / later_seconds if new_tokens > 1 and later_seconds > 0 else 0.0


def generate(model, processor, messages, sampling: Sampling | None = None) -> Answer:
    """The whole answer to one conversation, as ``[{"role": "user", "image": "cat.png", "content":
    "What is it?"}]``.

    Raises:
        ValueError: the prompt and ``max_new_tokens`` together exceed the model's context, or a
            message is wrong.
    """
    return _Generation(model, processor, messages, sampling).run(streamer=None)


def stream(
    model, processor, messages, sampling: Sampling | None = None, *, timeout_seconds: float = 120.0
) -> "Stream":
    """An answer that comes in pieces: iterate over the result, in a ``with`` block.

    Generation runs in a thread of its own. ``messages`` are as for ``generate``, and
    ``timeout_seconds`` is the longest silence between two tokens, the prefill included.
    """
    return Stream(_Generation(model, processor, messages, sampling), timeout_seconds)


class _Generation(StoppingCriteria):
    """One call of the model's ``generate``: counts tokens, and stops it when told to."""

    def __init__(self, model, processor, messages, sampling: Sampling | None):
        self.model, self.processor, self.messages = model, processor, messages
        self.sampling = sampling or Sampling()
        self.cancelled = threading.Event()
        self.started = self.last_token = time.monotonic()
        self.first_token: float | None = None
        self.new_tokens = 0
        # Of a model that several processes share; each runs this, and all stop at the same token.
        self.ranks = getattr(model, "ranks", None)

    def __call__(self, input_ids, scores, **kwargs) -> torch.BoolTensor:
        self.last_token = time.monotonic()
        self.first_token = self.first_token or self.last_token
        self.new_tokens += 1
        stop = self.cancelled.is_set()
        if self.ranks is not None:
            # All must know at the same token. To ask waits for the step that is on its way.
            asks = self.is_streamed and self.new_tokens % TOKENS_BETWEEN_RANKS == 0
            stop = asks and any(self.ranks.numbers(int(stop)))
        return torch.full((len(input_ids),), stop, device=input_ids.device)

    def run(self, streamer) -> Answer:
        with told(self.ranks):
            return self._run(streamer)

    def _run(self, streamer) -> Answer:
        self.is_streamed = streamer is not None  # nothing else is cancelled
        if is_batch(self.messages):
            raise ValueError(
                "The messages are a list of conversations. Expected one conversation, a list of"
                " messages. Ask them one after the other, or call model.generate for a batch."
            )
        inputs = self.processor.apply_chat_template(self.messages, add_generation_prompt=True)
        config, most = self.model.config, self.sampling.max_new_tokens
        # Three ids stand for each image in the prompt.
        image_tokens = config.vision_config.image_tokens - 3
        ids, images = inputs["input_ids"].shape[1], len(inputs.get("pixel_values", ()))
        prompt_tokens = ids + images * image_tokens
        if prompt_tokens + most > config.seq_length:
            raise ValueError(
                f"The conversation takes {prompt_tokens:,} tokens and the answer may take {most:,}"
                f" more, but the model's context is {config.seq_length:,} (seq_length). Lower"
                " max_new_tokens, shorten the question, or start a new conversation."
            )
        if self.sampling.seed is not None:
            torch.manual_seed(self.sampling.seed)
        output = self.model.generate(
            **inputs.to(input_device(self.model)),
            **self.sampling.arguments(),
            **decoding.arguments(self.model, streamer),
            stopping_criteria=StoppingCriteriaList([self]),
        )
        new = output[0, ids:].tolist()
        end_ids = self.model.generation_config.eos_token_id
        finish = "length" if len(new) == most else "cancelled"
        if new and new[-1] in (end_ids if isinstance(end_ids, list) else [end_ids]):
            finish = "end"
        finished = time.monotonic()
        return Answer(
            text=self.processor.tokenizer.decode(new, skip_special_tokens=True).strip(),
            finish=finish,
            prompt_tokens=prompt_tokens,
            new_tokens=len(new),
            first_token_seconds=(self.first_token or finished) - self.started,
            seconds=finished - self.started,
        )


class _Pieces(TextStreamer):
    """Hands finished words to a queue instead of printing them."""

    def __init__(self, tokenizer, pieces: queue.Queue):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.pieces, self.began = pieces, False

    def on_finalized_text(self, text: str, stream_end: bool = False):
        text = text if self.began else text.lstrip()  # answers begin with a line break
        if text:
            self.began = True
            self.pieces.put(text)


class Stream:
    """Iterates over the pieces of an answer; ``answer`` holds the whole once the iteration ended.

    ``cancel()`` ends it within one token, from any thread. Leaving the ``with`` block does the same
    and waits for the worker, so that nothing goes on running unseen.

    Raises:
        Exception: whatever ended the worker, once the pieces before it are read.
        TimeoutError: no token for ``timeout_seconds``.
    """

    def __init__(self, generation: _Generation, timeout_seconds: float):
        self.answer: Answer | None = None
        self._generation, self._timeout_seconds = generation, timeout_seconds
        self._pieces: queue.Queue = queue.Queue()
        self._error: BaseException | None = None
        self._hung = False
        self._worker = threading.Thread(target=self._work, daemon=True)
        self._worker.start()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *exception):
        self.cancel()
        self._worker.join(timeout=0 if self._hung else self._timeout_seconds)

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> str:
        # Waits while tokens come, though none may finish a word.
        patience = self._timeout_seconds
        while patience > 0:
            patience = self._generation.last_token + self._timeout_seconds - time.monotonic()
            try:  # what has come is read, however late
                piece = self._pieces.get(timeout=max(0.01, patience))
            except queue.Empty:
                continue
            if piece is not None:
                return piece
            self._pieces.put(None)  # for whoever asks again
            error, self._error = self._error, None
            raise StopIteration if error is None else error
        self.cancel()
        self._hung = True
        raise TimeoutError(
            f"No token for {self._timeout_seconds:g} s. Expected one in that time; the answer was"
            " cancelled. A long prompt, offloaded weights or a busy GPU need more: raise"
            " timeout_seconds."
        )

    @property
    def running(self) -> bool:
        """Whether the worker lives; after a ``TimeoutError`` it may, until its step ends."""
        return self._worker.is_alive()

    @property
    def new_tokens(self) -> int:
        """Tokens generated so far."""
        return self._generation.new_tokens

    @property
    def tokens_per_second(self) -> float:
        """Speed so far of the tokens after the first."""
        now = self._generation
        return _speed(now.new_tokens, now.last_token - (now.first_token or now.last_token))

    def cancel(self):
        """Stop within one token; the pieces that came stay readable."""
        self._generation.cancelled.set()

    def _work(self):
        tokenizer = self._generation.processor.tokenizer
        try:
            self.answer = self._generation.run(_Pieces(tokenizer, self._pieces))
        except BaseException as error:
            # The frames of a failed forward pass hold its tensors: an out-of-memory error that is
            # kept, or shown, would keep the memory too.
            clear_frames(error)
            self._error = error
        finally:
            self._pieces.put(None)
