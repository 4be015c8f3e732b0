"""Fast decoding: the model's own prefill, then steps of fused kernels, one launch a card each.

``FastDecoder`` is a decoding method of transformers' ``generate`` (its ``custom_generate``), which
prepares prompts, processors of logits and stopping criteria as for its own methods.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from transformers.generation import GenerationMode

from glm4v_nb.inference.supported import why_not
from glm4v_nb.inference.weights import LayerWeights, Weight, storage_of

if TYPE_CHECKING:  # brings Triton, and so is imported when the first answer is prepared
    from glm4v_nb.inference.step import FixedCache, Step

# Rows of a step that verifies several tokens of one sequence; rows of a batch at most.
MOST_ROWS = 8
# A cache is made in multiples of this, so that few lengths need one of their own.
CAPACITY_STEP = 1024
LONGEST_NGRAM = 3


class FastDecoder:
    """Decodes with fused kernels; one for a model, whose buffers and graphs it keeps.

    Args:
        lookup: guess the next tokens from what followed the same words earlier, and verify up to
            eight of them in a step; greedy answers to one prompt only.

    Attributes:
        steps, tokens: steps of the last answer, and tokens that they gave.
    """

    def __init__(self, lookup: bool = False):
        self.lookup = lookup
        self.steps = self.tokens = 0
        self._steps: dict[int, Step] = {}
        self._built_of: list[int] | None = None
        self._heads: list[tuple[torch.Tensor, torch.Tensor] | None] = []
        self._lock, self._is_answering = threading.RLock(), False

    def __reduce__(self):
        # Of a copied or saved model: buffers and graphs are of the weights they were made for.
        return FastDecoder, (self.lookup,)

    def prepare(self, model, sequences: int, length: int, rows: tuple[int, ...] = ()) -> FixedCache:
        """Cache, buffers and graphs for prompts with answers of so many positions together.

        ``rows`` are those of each step; by default as many as sequences, and with ``lookup`` for
        one sequence also those of a step that verifies.

        Raises:
            ValueError: more prompts than 8, or longer than the model's context.
            torch.OutOfMemoryError: no room; nothing is kept then.
        """
        context = model.config.seq_length
        if sequences > MOST_ROWS:
            raise ValueError(
                f"There are {sequences} prompts; fast decoding takes 1 to {MOST_ROWS} at a time."
                " Ask fewer, or load with decoding='eager'."
            )
        if length > context:
            raise ValueError(
                f"Prompt and answer may take {length:,} positions together, but the model's context"
                f" is {context:,} (seq_length). Lower max_new_tokens, or shorten the prompt."
            )
        from glm4v_nb.inference.step import FixedCache, Step

        # A step is launched before the token of the last is looked at, and verified rows may be
        # wrong: both can reach beyond the answer's end.
        capacity = -(-(length + MOST_ROWS) // CAPACITY_STEP) * CAPACITY_STEP
        decoder, head = model.language_model, Weight.of(model.lm_head.weight)
        weights = [LayerWeights.of(layer) for layer in decoder.layers]
        read = [each for one in weights for each in one.tensors()]
        read += [head.numbers, decoder.norm.weight, decoder.embed_tokens.weight]
        built_of = [storage_of(each) for each in read]
        cache = next((step.cache for step in self._steps.values()), None)
        if (
            cache is None
            or self._built_of != built_of
            or cache.sequences != sequences
            or cache.capacity < capacity
        ):
            self.release()
            cache = FixedCache(model.config.text_config, weights, sequences, capacity)
            self._built_of = built_of
        try:
            looks = self.lookup and sequences == 1
            for count in rows or ((1, MOST_ROWS) if looks else (sequences,)):
                if count not in self._steps:
                    self._steps[count] = Step(model, weights, cache, count)
        except BaseException:
            self.release()
            raise
        self._heads = [
            (one.heads.numbers, one.heads_bias) if one.heads.bits == 16 else None for one in weights
        ]
        return cache

    def prefill(self, model, cache: FixedCache, **prompt):
        """The model's output for the prompt's last position; the cache, of ``prepare``, is filled.

        ``prompt`` has the model's inputs, unpadded or padded on the left.
        """
        from glm4v_nb.inference.prefill import fused

        with torch.no_grad(), fused(model, self._heads):
            return model(**prompt, past_key_values=cache.empty(), use_cache=True, logits_to_keep=1)

    def memory(self) -> dict[str, int]:
        """Bytes on all cards: of the cache, of the steps' buffers, and reserved for their graphs
        and for the streams that these were captured on."""
        steps = list(self._steps.values())
        segments = torch.cuda.memory_snapshot()
        return {
            "fixed cache": sum(each.nbytes for pair in steps[0].cache.layers for each in pair),
            "buffers": sum(each.nbytes for step in steps for each in step.buffers()),
            "pools of graphs": sum(
                each["total_size"]
                for each in segments
                if each["stream"] or any(each["segment_pool_id"])
            ),
        }

    @torch.no_grad()
    def rehearse(self, logits: torch.Tensor, prompt: int, new_tokens: int):
        """The steps of an answer after a prompt of so many positions, looking at no token.

        ``logits`` (batch, vocabulary) are the prefill's.
        """
        batch, chosen = len(logits), logits.argmax(-1)
        step = self._steps[MOST_ROWS if self.lookup and batch == 1 else batch]
        places = [prompt + row // batch for row in range(step.rows)]
        step.place(places, places, [0] * step.rows, [row % batch for row in range(step.rows)])
        for _ in range(new_tokens - 1):
            step.tokens[:batch].copy_(chosen, non_blocking=True)
            step()
            chosen = step.next[:batch]
            _Reading(chosen)

    def release(self):
        """Give the cache, buffers and graphs back; the next answer makes them anew."""
        self._steps.clear()
        self._built_of = None
        self._heads = []

    def __call__(self, model, *args, **kwargs) -> torch.Tensor:
        """As ``decode``; also ValueError where the kernels cannot run the model."""
        # peft puts this in place for the while, and tokens of some adapters in front of prompts.
        asked = getattr(vars(model).get("prepare_inputs_for_generation"), "__self__", model)
        if reason := why_not(asked):
            raise ValueError(f"No fast decoding: {reason}. Load with decoding='eager'.")
        return self.decode(model, *args, **kwargs)

    def decode(
        self,
        model,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        streamer=None,
        **inputs,
    ) -> torch.Tensor:
        """As transformers calls a decoding method; returns (batch, prompt and answer).

        ``inputs`` are those of the prompt of a model that the kernels can run. Answers asked for in
        several threads are given one after the other.

        Raises:
            ValueError: as ``prepare``; padding on the right; beams and other modes; a cache or
                embeddings; an answer asked for within another.
        """
        _check_asked(generation_config, input_ids, inputs)
        with self._alone():
            batch, prompt = input_ids.shape
            sampled = generation_config.do_sample
            guesses = self.lookup and batch == 1 and not sampled and not len(logits_processor)
            end = generation_config.max_length
            cache = self.prepare(model, batch, end, () if guesses else (batch,))
            starts = _left_padding(inputs.get("attention_mask"), batch)
            names = ("attention_mask", "position_ids", "image_mask", "pixel_values")
            given = {name: inputs[name] for name in names if inputs.get(name) is not None}
            if not any(starts):  # else the model looks at the mask, and waits for the card
                given.pop("attention_mask", None)
            position = given["position_ids"][:, -1].tolist() if "position_ids" in given else None
            logits = self.prefill(model, cache, input_ids=input_ids, **given).logits[:, -1]
            answer = _Answer(input_ids, end, stopping_criteria, generation_config, streamer)
            answer.position = (
                [prompt - 1 - start for start in starts] if position is None else position
            )
            answer.starts = starts
            self.steps, self.tokens = 0, 0
            if guesses:
                self._verify(answer, logits)
            else:
                self._decode(answer, logits, logits_processor, sampled)
            self.tokens = answer.length - prompt
            if streamer is not None:
                streamer.end()
            return answer.ids[:, : answer.length].to(input_ids.device)

    @contextmanager
    def _alone(self):
        # Cache and buffers are those of one answer.
        with self._lock:
            if self._is_answering:
                raise ValueError(
                    "Within an answer of fast decoding the same model is asked for another, by a"
                    " streamer, criterion or processor. Expected one at a time. Load the model for"
                    " the second once more, or with decoding='eager'."
                )
            self._is_answering = True
            try:
                yield
            finally:
                self._is_answering = False

    def _decode(self, answer: _Answer, logits, processors, sampled: bool):
        """One token of every prompt a step; the next step is launched before a token is read."""
        step = self._steps[answer.batch]
        seen = answer.ids.to(logits.device) if sampled or len(processors) else None

        def choose(logits, likeliest, length):
            if not sampled and not len(processors):
                return likeliest
            scores = processors(seen[:, :length], logits.to(torch.float32, copy=True))
            if sampled:
                chosen = torch.multinomial(scores.softmax(-1), 1).squeeze(1)
            else:
                chosen = scores.argmax(-1)
            seen[:, length] = chosen
            return torch.where(likeliest < 0, likeliest, chosen)

        length = answer.length
        chosen = choose(logits, logits.argmax(-1), length)
        step.tokens.copy_(chosen, non_blocking=True)
        reading = _Reading(chosen)
        step.place([at + 1 for at in answer.position], [length] * answer.batch, answer.starts,
                   list(range(answer.batch)))  # fmt: skip
        while True:
            length += 1
            ahead = length < answer.end
            if ahead:
                step()
                self.steps += 1
            if answer.add(_present(step, reading.tokens())) or not ahead:
                return
            # No processor is asked what follows the end: one that knows which ids may is at a loss.
            chosen = choose(step.logits, step.next, length)
            # To the embedding first, which may be on another card; the CPU has time.
            step.tokens.copy_(chosen, non_blocking=True)
            reading = _Reading(chosen)

    def _verify(self, answer: _Answer, logits):
        """Up to eight tokens of one prompt a step, those that the guesses had right."""
        single, several = self._steps[1], self._steps[MOST_ROWS]
        if answer.add(logits.argmax(-1).tolist()):
            return
        first = answer.length - 1  # the slot of the token that was added last
        behind = first - 1 - answer.position[0]
        while True:
            slot = answer.length - 1
            guess = guess_next(answer.ids[0, : answer.length].tolist(), MOST_ROWS - 1)
            step = several if guess else single
            slots = list(range(slot, slot + step.rows))
            rows = [answer.ids[0, slot].item(), *guess]
            step.tokens[: len(rows)].copy_(torch.tensor(rows), non_blocking=True)
            step.place([at - behind for at in slots], slots, answer.starts * step.rows,
                       [0] * step.rows)  # fmt: skip
            step()
            self.steps += 1
            right = _present(step, step.next.tolist())
            for token, guessed in zip(right, [*guess, None], strict=False):
                if answer.add([token]):
                    return
                if token != guessed:
                    break


def _present(step: Step, tokens: list[int]) -> list[int]:
    """The tokens; RankLost where the step says by them that another rank did not come."""
    if min(tokens) < 0:
        raise step.ranks.lost("it waited for their parts of a sum")
    return tokens


def guess_next(ids: list[int], most: int) -> list[int]:
    """The tokens that followed the last few ones where they stood before, at most so many.

    The longest match of three to one tokens counts, and of several the latest; none: an empty list.
    """
    for size in range(min(LONGEST_NGRAM, len(ids) - 1), 0, -1):
        last = ids[-size:]
        for start in range(len(ids) - size - 1, -1, -1):
            if ids[start : start + size] == last:
                return ids[start + size : start + size + most]
    return []


class _Answer:
    """The tokens so far, on the CPU, and whether each prompt's answer has ended."""

    def __init__(self, input_ids, end: int, criteria, config, streamer):
        self.batch, self.length, self.end = *input_ids.shape, end
        self.criteria, self.streamer = criteria, streamer
        self.ids = torch.zeros(self.batch, end, dtype=torch.long)
        self.ids[:, : self.length] = torch.tensor(input_ids.tolist())
        self.unfinished = torch.ones(self.batch, dtype=torch.bool)
        pad = getattr(config, "_pad_token_tensor", None)
        self.pad = 0 if pad is None else int(pad)
        # As transformers does: what else ends an answer leaves its tokens.
        self.pads = any(hasattr(each, "eos_token_id") for each in criteria)
        self.position: list[int] = []
        self.starts: list[int] = []
        if streamer is not None:
            streamer.put(input_ids.cpu())

    def add(self, tokens: list[int]) -> bool:
        """Take one token a prompt; whether all answers have ended."""
        new = torch.tensor(tokens)
        if self.pads:
            new = torch.where(self.unfinished, new, self.pad)
        self.ids[:, self.length] = new
        self.length += 1
        if self.streamer is not None:
            self.streamer.put(new)
        ended = self.criteria(self.ids[:, : self.length], None)
        # As numbers: what comes from a simulated card is written into no tensor of the host.
        self.unfinished &= ~torch.tensor(torch.as_tensor(ended).tolist())
        return not self.unfinished.any()


class _Reading:
    """Tokens on their way to the CPU, which does not wait until they are asked for."""

    def __init__(self, chosen: torch.Tensor):
        self.copy, self.arrived = chosen, None
        if chosen.is_cuda:
            self.copy = torch.empty(chosen.shape, dtype=chosen.dtype, pin_memory=True)
            self.copy.copy_(chosen, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record(torch.cuda.current_stream(chosen.device))
        else:
            self.copy = chosen.clone()  # the next step writes its own there

    def tokens(self) -> list[int]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.copy.tolist()


def _check_asked(config, input_ids: torch.Tensor, inputs: dict):
    mode = config.get_generation_mode()
    plain = GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE
    if mode not in plain or config.return_dict_in_generate:
        raise ValueError(
            "Fast decoding takes the likeliest token or draws one, and returns tokens alone; asked"
            f" for is {mode.value.replace('_', ' ')}. Expected num_beams 1 and"
            " return_dict_in_generate False. Load with decoding='eager' for the rest."
        )
    if not input_ids.shape[1] or inputs.get("inputs_embeds") is not None:
        raise ValueError(
            "Fast decoding has no ids of the prompt, or embeddings instead. Expected input_ids of"
            " one position at least. Give those alone, or load with decoding='eager'."
        )
    cache = inputs.get("past_key_values")
    if cache is not None and (getattr(cache, "_is_user_defined", 0) or cache.get_seq_length()):
        raise ValueError(
            "past_key_values is given, but fast decoding has a cache of its own, and would leave"
            " this one as it is. Give the whole conversation without it, or load with"
            " decoding='eager'."
        )


def _left_padding(mask: torch.Tensor | None, batch: int) -> list[int]:
    """How many positions of each prompt are padding, which must be on the left."""
    if mask is None:
        return [0] * batch
    starts = (mask == 0).sum(1)
    if not bool((mask[:, -1:] != 0).all()) or bool((mask.diff(dim=1) < 0).any()):
        raise ValueError(
            "The attention mask has padding on the right or inside. Expected it on the left, as the"
            " processor makes it."
        )
    return starts.tolist()
