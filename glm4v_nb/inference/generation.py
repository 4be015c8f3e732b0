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
from glm4v_nb.model.chat import is_batch
from glm4v_nb.placement import input_device

CANCELLED, LENGTH, END = "cancelled", "length", "end"


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

    def arguments(self) -> dict:
        """As arguments of transformers' ``generate``."""
        if self.temperature == 0:
            # Overwrites the sampling defaults a checkpoint's generation_config.json may carry.
            chosen = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        else:
            chosen = {
                "do_sample": True,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "top_k": 0,
            }
        return {"max_new_tokens": self.max_new_tokens, **chosen}


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
        later = self.seconds - self.first_token_seconds
        return (self.new_tokens - 1) / later if self.new_tokens > 1 and later > 0 else 0.0


def generate(model, processor, messages, sampling: Sampling | None = None) -> Answer:
    """The whole answer to a conversation.

    Args:
        messages: one conversation, e.g. ``[{"role": "user", "image": "cat.png", "content": "What is
            it?"}]``.

    Raises:
        ValueError: the prompt and ``max_new_tokens`` together exceed the model's context, or a
        message is wrong. torch.OutOfMemoryError: as it comes from the device.
    """
    return _Run(model, processor, messages, sampling or Sampling()).run(streamer=None)


def stream(
    model, processor, messages, sampling: Sampling | None = None, *, timeout_seconds: float = 120.0
) -> "Stream":
    """An answer that comes in pieces: iterate over the result, in a ``with`` block.

    Generation runs in a thread of its own. An error in it is raised here, with its type.

    Args:
        messages: as for ``generate``.
        timeout_seconds: longest silence between two tokens, the first one's prefill included.
    """
    return Stream(_Run(model, processor, messages, sampling or Sampling()), timeout_seconds)


class _Run(StoppingCriteria):
    """One call of the model's ``generate``: counts tokens, and stops it when told to."""

    def __init__(self, model, processor, messages, sampling: Sampling):
        self.model, self.processor, self.messages, self.sampling = (
            model,
            processor,
            messages,
            sampling,
        )
        self.cancelled = threading.Event()
        self.started = time.monotonic()
        self.first: float | None = None
        self.alive = self.started  # when the last token came
        self.new_tokens = 0

    def __call__(self, input_ids, scores, **kwargs) -> torch.BoolTensor:
        self.alive = time.monotonic()
        self.first = self.first or self.alive
        self.new_tokens += 1
        return torch.full((len(input_ids),), self.cancelled.is_set(), device=input_ids.device)

    def run(self, streamer) -> Answer:
        if is_batch(self.messages):
            raise ValueError(
                "The messages are a list of conversations. Expected one conversation, a list of"
                " messages. Ask them one after the other, or call model.generate for a batch."
            )
        inputs = self.processor.apply_chat_template(self.messages, add_generation_prompt=True)
        prompt_tokens = self._check_context(inputs)
        if self.sampling.seed is not None:
            torch.manual_seed(self.sampling.seed)
        output = self.model.generate(
            **inputs.to(input_device(self.model)),
            **self.sampling.arguments(),
            stopping_criteria=StoppingCriteriaList([self]),
            streamer=streamer,
        )
        new = output[0, inputs["input_ids"].shape[1] :].tolist()
        ended = new and new[-1] in _end_ids(self.model)
        finish = END if ended else LENGTH if len(new) == self.sampling.max_new_tokens else CANCELLED
        finished = time.monotonic()
        return Answer(
            text=self.processor.tokenizer.decode(new, skip_special_tokens=True).strip(),
            finish=finish,
            prompt_tokens=prompt_tokens,
            new_tokens=len(new),
            first_token_seconds=(self.first or finished) - self.started,
            seconds=finished - self.started,
        )

    def _check_context(self, inputs) -> int:
        config = self.model.config
        images = len(inputs["pixel_values"]) if "pixel_values" in inputs else 0
        # Three ids stand for each image in the prompt.
        prompt_tokens = inputs["input_ids"].shape[1] + images * (
            config.vision_config.image_tokens - 3
        )
        wanted = prompt_tokens + self.sampling.max_new_tokens
        if wanted > config.seq_length:
            raise ValueError(
                f"The conversation takes {prompt_tokens:,} tokens and the answer may take"
                f" {self.sampling.max_new_tokens:,} more, but the model's context is"
                f" {config.seq_length:,} (seq_length). Lower max_new_tokens, shorten the question,"
                " or start a new conversation."
            )
        return prompt_tokens


class _Pieces(TextStreamer):
    """Hands finished words to a queue instead of printing them."""

    def __init__(self, tokenizer, pieces: queue.Queue):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.pieces = pieces
        self.began = False

    def on_finalized_text(self, text: str, stream_end: bool = False):
        if not self.began:  # answers begin with a line break
            text = text.lstrip()
        if text:
            self.began = True
            self.pieces.put(text)


class Stream:
    """Iterates over the pieces of an answer; ``answer`` holds the whole once the iteration has
    ended.

    ``cancel()`` ends it within one token, from any thread. Leaving the ``with`` block does the same
    and waits for the worker, so that nothing goes on running unseen.

    Raises:
        Exception: whatever ended the worker, an out-of-memory error above all, when the pieces
            before it are read.
        TimeoutError: no token for ``timeout_seconds``.
    """

    def __init__(self, run: _Run, timeout_seconds: float):
        self.answer: Answer | None = None
        self._run, self._timeout_seconds = run, timeout_seconds
        self._pieces: queue.Queue = queue.Queue()
        self._error: BaseException | None = None
        self._hung = False
        self._worker = threading.Thread(target=self._work, name="glm4v-nb answer", daemon=True)
        self._worker.start()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *exception):
        self.cancel()
        self._worker.join(timeout=0 if self._hung else self._timeout_seconds)

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> str:
        while True:
            patience = self._run.alive + self._timeout_seconds - time.monotonic()
            try:
                piece = self._pieces.get(timeout=max(0.01, patience))
            except queue.Empty:
                if self._run.alive + self._timeout_seconds > time.monotonic():
                    continue  # tokens come, but none has finished a word
                self.cancel()
                self._hung = True
                raise TimeoutError(
                    f"No token for {self._timeout_seconds:g} s. Expected one in that time; the"
                    " answer was cancelled. A long prompt, offloaded weights or a busy GPU need"
                    " more: raise timeout_seconds."
                ) from None
            if piece is not None:
                return piece
            self._pieces.put(None)  # for whoever asks again
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            raise StopIteration

    @property
    def running(self) -> bool:
        """Whether the worker is still alive; after a ``TimeoutError`` it may be, until its step
        ends."""
        return self._worker.is_alive()

    @property
    def new_tokens(self) -> int:
        """Tokens generated so far."""
        return self._run.new_tokens

    @property
    def tokens_per_second(self) -> float:
        """Speed so far of the tokens after the first."""
        run = self._run
        later = run.alive - (run.first or run.alive)
        return (run.new_tokens - 1) / later if later > 0 else 0.0

    def cancel(self):
        """Stop within one token; the pieces that came stay readable."""
        self._run.cancelled.set()

    def _work(self):
        run = self._run
        try:
            self.answer = run.run(_Pieces(run.processor.tokenizer, self._pieces))
        except BaseException as error:
            # The frames of a failed forward pass hold its tensors: an out-of-memory error that is
            # kept, or shown, would keep the memory too.
            clear_frames(error)
            self._error = error
        finally:
            self._pieces.put(None)


def _end_ids(model) -> set[int]:
    ids = model.generation_config.eos_token_id
    return set(ids if isinstance(ids, list) else [ids])
