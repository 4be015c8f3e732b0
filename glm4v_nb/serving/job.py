"""One request on its way through the model: how its tokens are chosen, and what becomes text."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tokenizers.decoders import DecodeStream
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from glm4v_nb.inference import Sampling
from glm4v_nb.serving.protocol import Refusal


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

    @property
    def refusal(self) -> Refusal:
        """As clients are told."""
        return Refusal(self.status, self.code, self.message)


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
        warpers = [TemperatureLogitsWarper(sampling.temperature)] if sampling.draws else []
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
            self.text.add(token)
        ended = token in end_ids or self.text.stopped
        if not ended and self.new_tokens < self.sampling.max_new_tokens:
            return None
        self.text.end()
        return Done("stop" if ended or self.text.stopped else "length", self.new_tokens)


class _AnswerText:
    """Tells text that will not change, and nothing from a stop text on, however tokens cut it."""

    def __init__(self, tokenizer, stop: tuple[str, ...], tell: Callable[[str], None]):
        self.stop, self.tell = stop, tell
        self.stopped = self.began = False
        self._decoding, self._tokenizer = (
            DecodeStream(skip_special_tokens=True),
            tokenizer.backend_tokenizer,
        )
        self._held, self._longest = "", max(map(len, stop), default=1)
        self._pending: list[int] = []  # tokens that end within a character

    def add(self, token: int):
        self._pending.append(token)
        text = self._decoding.step(self._tokenizer, token)
        if text is not None:  # a character's bytes are all there
            self._pending.clear()
            self._take(text)

    def end(self):
        """Tell what was held back, and a character that was cut, as ``generate`` does."""
        if not self.stopped:
            self._take(self._tokenizer.decode(self._pending))
        self._tell(self._held, 0 if self.stopped else len(self._held))

    def _take(self, more: str):
        text = self._held + more
        if not self.began:
            text = text.lstrip()  # answers begin with a line break
        found = [at for each in self.stop if (at := text.find(each)) >= 0]
        self.stopped = bool(found)
        # What may be the begin of a stop text is held back.
        self._tell(text, min(found) if found else max(0, len(text) - self._longest + 1))

    def _tell(self, text: str, until: int):
        self._held = text[until:]
        if text[:until]:
            self.began = True
            self.tell(text[:until])
