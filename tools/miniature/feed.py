"""Training examples drawn by worker processes, and the ids of their conversations.

One *example* is a picture with ``ROWS`` conversations about it. Every conversation begins
``[gMASK]<sop><|user|>\\n``, then the image, then the first question, so the image stands at the
same positions in every row. Workers write into memory shared with the trainer, which needs no
/dev/shm.
"""

import io
import itertools
import mmap
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from glm4v_nb.model.tokenization import ChatGLM4Tokenizer
from tools.miniature.questions import KINDS, LANGUAGES, ask
from tools.miniature.scenes import draw, encode, is_wide, random_scene, random_size

ROWS = 2
# Ids of one conversation after the image: questions, role tokens and answers.
TEXT_LENGTH = 80
MAXIMUM_TURNS = 4
IGNORED = -100
CHUNK = 64  # examples a worker hands over at once
SLOTS = 4  # chunks a worker draws ahead
GREY, JPEG = 0.06, 0.2  # share of the pictures


@dataclass
class Examples:
    """``pixels`` uint8 [n, side, side, 3]; ``ids`` and ``labels`` int16 [n, ROWS, TEXT_LENGTH],
    where ``labels[..., i]`` is the id that should follow ``ids[..., i]``, or -100."""

    pixels: np.ndarray
    ids: np.ndarray
    labels: np.ndarray


class ConversationEncoder:
    """Encodes questions and answers with a cache: the grammar's texts repeat."""

    def __init__(self, tokenizer: ChatGLM4Tokenizer):
        self.tokenizer = tokenizer
        self.cache: dict[str, list[int]] = {}
        self.user, self.assistant, self.pad = tokenizer.convert_tokens_to_ids(
            ["<|user|>", "<|assistant|>", "<|endoftext|>"]
        )
        self.newline = self.text("\n")

    def text(self, text: str) -> list[int]:
        """Ids of one text without anything added."""
        if text not in self.cache:
            self.cache[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self.cache[text]

    def prefix(self) -> list[int]:
        """Ids before the image."""
        return [
            *self.tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>"]),
            self.user,
            *self.newline,
        ]

    def turns(self, turns: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
        """Ids after the image and, for each, the id to predict next (-100 outside answers)."""
        ids: list[int] = []
        targets: list[int] = []
        for number, (question, answer) in enumerate(turns):
            asked = [*(self.newline if number else []), *self.text(question), self.assistant]
            answered = [*self.newline, *self.text(answer), self.user]
            ids += asked + answered
            targets += [IGNORED] * len(asked) + answered
        return ids, targets[1:] + [IGNORED]


def draw_examples(
    count: int, side: int, encoder: ConversationEncoder, rng: np.random.Generator, into: Examples
) -> None:
    """Fill ``into`` with ``count`` new examples; the same ``rng`` state gives the same examples."""
    for index in range(count):
        size = random_size(rng)
        scene = random_scene(rng, wide=is_wide(size), grey=rng.random() < GREY)
        picture = draw(scene, size)
        if rng.random() < JPEG:
            picture = Image.open(
                io.BytesIO(encode(picture, "JPEG", quality=int(rng.integers(40, 96))))
            )
        into.pixels[index] = np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC))
        for row in range(ROWS):
            ids, labels = _conversation(scene, encoder, rng)
            into.ids[index, row] = encoder.pad
            into.labels[index, row] = IGNORED
            into.ids[index, row, : len(ids)] = ids
            into.labels[index, row, : len(labels)] = labels


def _conversation(scene, encoder: ConversationEncoder, rng) -> tuple[list[int], list[int]]:
    turns: list[tuple[str, str]] = []
    ids, labels = [], []
    language = LANGUAGES[rng.integers(2)]
    for _ in range(3 * MAXIMUM_TURNS):
        if rng.random() < 0.1:
            language = LANGUAGES[rng.integers(2)]
        question = ask(scene, KINDS[rng.integers(len(KINDS))], language, rng)
        if question is None or question in turns:
            continue
        longer = encoder.turns([*turns, question])
        if len(longer[0]) > TEXT_LENGTH:
            break
        turns.append(question)
        ids, labels = longer
        if len(turns) == MAXIMUM_TURNS:
            break
    return ids, labels


class Feed:
    """Iterates over chunks of examples, drawn by ``workers`` processes; 0 draws in this process.

    The chunks and their order depend on ``seed`` alone. Make it before CUDA is used: workers are
    forked.
    """

    def __init__(self, tokenizer_directory: Path, side: int, seed: int, workers: int):
        self.tokenizer_directory, self.side, self.seed = tokenizer_directory, side, seed
        self.workers: list[tuple] = []
        context = multiprocessing.get_context("fork")
        for number in range(workers):
            slots = [_shared_examples(side) for _ in range(SLOTS)]
            free, ready = context.Semaphore(SLOTS), context.Semaphore(0)
            process = context.Process(
                target=self._work, args=(number, workers, slots, free, ready), daemon=True
            )
            process.start()
            self.workers.append((process, slots, free, ready))

    def __iter__(self) -> Iterator[Examples]:
        """Chunks of ``CHUNK`` examples; one is valid until the next is asked for."""
        if not self.workers:
            encoder, examples = self._encoder(), _shared_examples(self.side)
            for number in itertools.count():
                self._draw(number, encoder, examples)
                yield examples
        turn = 0
        while True:
            for process, slots, free, ready in self.workers:
                while not ready.acquire(timeout=5):
                    if not process.is_alive():
                        raise RuntimeError(
                            f"A drawing process ended with exit code {process.exitcode}; expected"
                            " it to run as long as the training. Run with --workers 0 to see its"
                            " error here."
                        )
                yield slots[turn % SLOTS]
                free.release()
            turn += 1

    def close(self) -> None:
        """Stop the drawing processes."""
        for process, *_ in self.workers:
            process.terminate()
            process.join()

    def _encoder(self) -> ConversationEncoder:
        return ConversationEncoder(ChatGLM4Tokenizer.from_pretrained(self.tokenizer_directory))

    def _draw(self, number: int, encoder: ConversationEncoder, examples: Examples):
        draw_examples(
            CHUNK, self.side, encoder, np.random.default_rng([self.seed, number]), examples
        )

    def _work(self, first: int, step: int, slots: list[Examples], free, ready) -> None:
        encoder = self._encoder()
        for turn, number in enumerate(itertools.count(first, step)):
            free.acquire()
            self._draw(number, encoder, slots[turn % SLOTS])
            ready.release()


def _shared_examples(side: int) -> Examples:
    def shared(shape, dtype):
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer(mmap.mmap(-1, size), dtype).reshape(shape)

    text = (CHUNK, ROWS, TEXT_LENGTH)
    return Examples(
        shared((CHUNK, side, side, 3), np.uint8), shared(text, np.int16), shared(text, np.int16)
    )
