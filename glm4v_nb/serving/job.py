"""One request on its way through the model: how its tokens are chosen, and what becomes text."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TextStreamer,
    TopPLogitsWarper,
)

from glm4v_nb.inference import Sampling


@dataclass(frozen=True)
class Piece:
    """Text of an answer that will not change."""

    text: str


@dataclass(frozen=True)
class Done:
    """The end of an answer: "stop" or "length", and how many tokens were generated."""

    finish: str
    new_tokens: int


@dataclass(frozen=True)
class Failure:
    """The end of a request that got no answer, or no more of it."""

    status: int
    code: str
    message: str


class Job:
    """A prepared request.

    Args:
        inputs: as the processor makes them: input_ids (1, length), and pixel_values with an image.
        prompt_positions: of the prompt, an image counted as all its positions.
        sampling: ``max_new_tokens`` fits into the room behind the prompt.
        stop: texts that end the answer before them.
        tokenizer: of the model.
        tell: called with each Piece and with the Done or Failure that ends it; by the thread of the
            engine, so it must not wait.
    """

    def __init__(
        self,
        inputs: dict[str, torch.Tensor],
        prompt_positions: int,
        sampling: Sampling,
        stop: tuple[str, ...],
        tokenizer,
        tell: Callable[[Piece | Done | Failure], None],
    ):
        self.inputs, self.prompt_positions, self.tell = inputs, prompt_positions, tell
        self.sampling, self.asked = sampling, time.monotonic()
        self.cancelled = False
        self.new_tokens = 0
        self.token: int | None = None
        self.row: int | None = None
        self.text = _AnswerText(tokenizer, stop, lambda text: tell(Piece(text)))
        # Of the token that was chosen last: its number in the prompt, and its place in the cache.
        self.position = inputs["input_ids"].shape[1] - 1
        self.slot = prompt_positions - 1
        self._generator: torch.Generator | None = None
        warpers = [TemperatureLogitsWarper(sampling.temperature)] if sampling.temperature else []
        if warpers and sampling.top_p < 1:
            warpers.append(TopPLogitsWarper(sampling.top_p))
        self._warpers = LogitsProcessorList(warpers)

    def choose(self, logits: torch.Tensor, likeliest: int) -> int:
        """The next token of logits (vocabulary,), whose likeliest is known."""
        if not self._warpers:
            return likeliest
        if self._generator is None:
            self._generator = torch.Generator(device=logits.device)
            seed = self.sampling.seed
            _ = self._generator.seed() if seed is None else self._generator.manual_seed(seed)
        scores = self._warpers(None, logits[None].float())
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))

    def add(self, token: int, end_ids: set[int]) -> Done | None:
        """Take the token that was chosen; the end, if it is that of the answer."""
        self.token = token
        self.new_tokens += 1
        self.position += 1
        self.slot += 1
        if token not in end_ids:
            self.text.put(torch.tensor([token]))
        finish = "length" if self.new_tokens == self.sampling.max_new_tokens else None
        finish = "stop" if token in end_ids or self.text.stopped else finish
        if finish is None:
            return None
        self.text.end()
        # Words that were held back may have had the text that ends it.
        return Done("stop" if self.text.stopped else finish, self.new_tokens)


class _AnswerText(TextStreamer):
    """Tells whole words, and nothing from a stop text on, however the tokens cut it."""

    def __init__(self, tokenizer, stop: tuple[str, ...], tell: Callable[[str], None]):
        super().__init__(tokenizer, skip_special_tokens=True)
        self.stop, self.tell = stop, tell
        self.stopped = self.began = False
        self._held, self._longest = "", max(map(len, stop), default=1)

    def on_finalized_text(self, text: str, stream_end: bool = False):
        if self.stopped:
            return
        text = self._held + text
        if not self.began:
            text = text.lstrip()  # answers begin with a line break
        found = [at for each in self.stop if (at := text.find(each)) >= 0]
        kept = len(text) if stream_end else max(0, len(text) - self._longest + 1)
        if found:
            self.stopped, kept = True, min(found)
        text, self._held = text[:kept], text[kept:]
        if text:
            self.began = True
            self.tell(text)
