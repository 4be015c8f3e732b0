"""How far does it go? The largest batch, the longest context, the best device map, by running.

The model is loaded once per device map and many workloads run on it, each from the same bytes:
those of a server that has answered before. The very first run after a load, which is what ``fit``
shows, may take a sample more or less, as the allocator's holes depend on what ran before.

Edges are found by bisection, which assumes that what fits also fits when made smaller. The holes
can break that too, by a little: an edge is what was seen (this much ran, one more did not), and no
promise for all below it.
"""

import gc
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

import torch

from simgpu.fitting import DTYPES, Deployment, FitResult, LoadedModel
from simgpu.placement import Place
from simgpu.recipes import Recipe
from simgpu.units import GIB
from simgpu.workload import Workload

# The search for the largest batch ends here.
MOST_SAMPLES = 4096
_LENGTHS = (32, 512, 1024, 2048, 4096, 16384, 65536)
# A map that needs max_memory must leave this much more room to be worth the typing.
_WORTH_BYTES = GIB // 4


@dataclass(frozen=True)
class Edge:
    """The largest size that fits, 0 if none. ``limited_by``: "memory", "model", "decoding" or
    "search"."""

    size: int
    limited_by: str


@dataclass(frozen=True)
class Recommendation:
    """Arguments for ``from_pretrained``, and what they leave.

    Attributes:
        device_map, max_memory: what to pass; a strategy or a dictionary, GiB per card or None.
        placement: the map that comes of it, every module with its card.
        headroom_bytes: per card, what the driver still has when most is reserved.
        code: the lines of Python to paste.
    """

    device_map: str | dict[str, Place]
    max_memory: dict[int, str] | None
    placement: dict[str, Place]
    headroom_bytes: list[int] = field(default_factory=list)
    code: str = ""

    @property
    def on_cards_only(self) -> bool:
        """Whether nothing is left to the CPU."""
        return all(isinstance(place, int) for place in self.placement.values())


@dataclass(frozen=True)
class Limits:
    """The whole answer; ``to_dict`` is what ``fit --limits --json`` prints."""

    result: FitResult
    largest_batch: Edge
    longest_context: Edge
    recommendation: Recommendation | None
    seconds: float

    def to_dict(self) -> dict:
        """The keys of a plain fit, then the limits; ``longest_context`` counts text tokens."""
        result, host = self.result, self.result.host
        headroom = [device.free_at_peak_bytes for device in result.devices]
        beside = {"host": host and asdict(host), "headroom_bytes": headroom}
        parts = ("largest_batch", "longest_context", "recommendation")
        found = {name: getattr(self, name) and asdict(getattr(self, name)) for name in parts}
        return result.to_dict() | beside | found | {"seconds": self.seconds}


class Trials(LoadedModel):
    """A model that is loaded once, to run many workloads on, each from the same bytes.

    ``report`` is called with a text before every run, and without one after every step of
    ``limits`` and ``frontier``. Raises ValueError as ``Deployment.check`` does.

    Attributes:
        base: bytes allocated and reserved per card before every run.
        runs: what has run, and its result.
    """

    def __init__(self, deployment: Deployment, report: Callable = lambda text=None: None):
        deployment.check(Workload(images=0, text_tokens=1, new_tokens=1))
        super().__init__(deployment)
        self.report = report
        self.runs: dict[Workload, FitResult] = {}
        self.base = self._held()
        self._warm: set[str] = set()

    def run(self, workload: Workload) -> FitResult:
        """Run a workload, if it has not run; RuntimeError if something stays on the cards."""
        if self.error is not None:
            return super().run(workload)
        if workload in self.runs:
            return self.runs[workload]
        sizes = f"{workload.images} images, {workload.text_tokens} tokens"
        self.report(f"{workload.batch_size} x {sizes}")
        kind = workload.trained if workload.train else "inference"
        if kind not in self._warm:
            # What stays for good: workspaces of matrix products, of a backward pass, adapters.
            self._run_and_drop(
                replace(workload, batch_size=1, images=0, text_tokens=1, new_tokens=1)
            )
            self._warm.add(kind)
            self.base = self._held()
        self.runs[workload] = self._run_and_drop(workload)
        if self._held() != self.base:
            # It may be the first with products of a kind that has a workspace of its own.
            self.base = self._held()
            self.runs[workload] = self._run_and_drop(workload)
        if self._held() != self.base:
            raise RuntimeError(
                f"After {workload} the cards hold {self._held()} bytes (allocated, reserved);"
                f" expected {self.base}, as before it. Something still refers to tensors of the"
                " run."
            )
        return self.runs[workload]

    def _run_and_drop(self, workload: Workload) -> FitResult:
        self.rig.stages.clear()
        result = super().run(workload)
        self.model.zero_grad(set_to_none=True)
        self.model.eval()
        gc.collect()
        with self.rig:
            torch.cuda.empty_cache()
        return result

    def _held(self) -> list[tuple[int, int]]:
        return [(memory.allocated_bytes, memory.reserved_bytes) for memory in self.rig.memory()]


def limits(trials: Trials, workload: Workload) -> Limits:
    """Everything ``fit --limits`` answers, in four steps; ValueError for a workload whose
    prompt or answer exceeds the model's context."""
    started = time.perf_counter()
    # The plain answer is that of a fresh load.
    answers = [trials.deployment.fit(workload)]
    trials.runs[workload] = answers[0]
    trials.report()
    for step in (largest_batch, longest_context, recommend):
        answers.append(step(trials, workload))
        trials.report()
    return Limits(*answers, round(time.perf_counter() - started, 2))


def largest_batch(trials: Trials, workload: Workload, most: int = MOST_SAMPLES) -> Edge:
    """The largest batch of these samples that fits, up to ``most``, whatever their number is."""
    allowed = trials.deployment.recipe.most_samples
    end, most = ("search", most) if allowed is None else ("decoding", min(most, allowed))
    # As many as fit if each needed what the first one does beyond the weights.
    first, guess = trials.run(replace(workload, batch_size=1, new_tokens=0)), 1
    if first.fits:
        held = zip(first.devices, trials.base, strict=True)
        used = [(device.peak_reserved_bytes - reserved, device) for device, (_, reserved) in held]
        rooms = [1 + device.free_at_peak_bytes // size for size, device in used if size > 0]
        guess = min(rooms, default=1)
    size = _largest_that_fits(trials, workload, "batch_size", most, guess)
    return Edge(size, "memory" if size < most else end)


def longest_context(trials: Trials, workload: Workload) -> Edge:
    """The largest ``text_tokens`` that fit at the workload's batch size, up to the model's context.

    Prompt and answer share the context: of 8192 positions with an image of 1602 and 128 new tokens,
    whose last is never read, 8192 - 1602 - 127 remain for text.
    """
    most = _most_text_tokens(trials.deployment.recipe, workload)
    if most and trials.run(replace(workload, text_tokens=most)).fits:
        return Edge(most, "model")
    return Edge(_largest_that_fits(trials, workload, "text_tokens", most, most), "memory")


def frontier(trials: Trials, workload: Workload, token_counts: list[int] = ()) -> dict[int, int]:
    """The largest batch for each number of text tokens, 0 where none fits.

    A longer prompt does not allow a larger batch, so each search ends where the one before did.
    Decode steps are run only where the answer is longer than a quarter of the prompt: a position of
    the prompt takes several times more in the prefill than a new token adds to the KV cache.
    ``token_counts`` may be in any order; by default they are ``frontier_tokens``.
    """
    recipe = trials.deployment.recipe
    image_positions = workload.images and workload.images * recipe.image_positions
    found: dict[int, int] = {}
    most = MOST_SAMPLES
    for tokens in sorted(token_counts or frontier_tokens(workload, recipe)):
        sized = replace(workload, text_tokens=tokens)
        is_short = 4 * workload.new_tokens <= tokens + image_positions
        if not workload.train and recipe.decoding == "eager" and is_short:
            sized = replace(sized, new_tokens=0)
        most = found[tokens] = largest_batch(trials, sized, most).size if most else 0
        trials.report()
    return found


def frontier_tokens(workload: Workload, recipe: Recipe) -> list[int]:
    """Lengths that show a frontier's shape: from 32 text tokens to the end of the context."""
    most = _most_text_tokens(recipe, workload)
    if not most:
        raise ValueError(
            f"{recipe.loader} takes no text, whose length a frontier shows. Use --limits for the"
            " largest batch."
        )
    return [*(count for count in _LENGTHS if count < most), most]


def recommend(trials: Trials, workload: Workload) -> Recommendation | None:
    """The device map that leaves the fullest card the most room; None where none fits.

    Tried are "auto" ("balanced" makes the same map), "sequential", and "auto" with ``max_memory``
    set so that the card with the image tower, whose activations "auto" knows nothing of, is given
    fewer weights. The last is taken only where it gains a quarter of a GiB.
    """
    deployment = trials.deployment
    if len(deployment.cards) == 1:
        return _better(None, Recommendation({"": 0}, None, {"": 0}), trials, workload)
    free = deployment.free_bytes()
    best = measured = None
    for strategy in ("auto", "sequential"):
        candidate = Recommendation(strategy, None, deployment.plan(strategy, free))
        on_map = _on_map(trials, candidate)
        measured = measured or on_map
        best = _better(best, candidate, on_map, workload)
    for _ in range(2):
        # Once from what "auto" showed, once more from the better map that gave.
        candidate = _balanced(measured, workload, free)
        if candidate is None or candidate.placement == measured.device_map:
            break
        measured = _on_map(trials, candidate)
        best = _better(best, candidate, measured, workload)
    return best


def _on_map(trials: Trials, candidate: Recommendation) -> Trials:
    """Trials on this map: the same ones if it is their map, or if none can be run."""
    if candidate.placement == trials.device_map or not candidate.on_cards_only:
        return trials
    return Trials(replace(trials.deployment, device_map=candidate.placement), trials.report)


def _better(
    best: Recommendation | None, candidate: Recommendation, trials: Trials, workload: Workload
) -> Recommendation | None:
    """The candidate, if it fits on cards alone and its fullest has more room than before."""
    if not candidate.on_cards_only:
        return best
    worth = _WORTH_BYTES if candidate.max_memory else 0
    for tried in (replace(workload, new_tokens=0), workload):  # the prefill may be enough to say no
        result = trials.run(tried)
        headroom = [device.free_at_peak_bytes for device in result.devices]
        if not result.fits or (best and min(headroom) <= min(best.headroom_bytes) + worth):
            return best
    code = _code(candidate, trials.deployment)
    return replace(candidate, headroom_bytes=headroom, code=code)


def _code(candidate: Recommendation, deployment: Deployment) -> str:
    limits = (candidate.max_memory or {}).items()
    sizes = ", ".join(f'{card}: "{size}"' for card, size in limits)
    max_memory = f"    max_memory={{{sizes}}},\n" if sizes else ""
    imports, quantised = deployment.recipe.import_lines, ""
    if deployment.weights is not None:
        more, made = deployment.recipe.quantiser_lines(deployment.quantiser)
        imports, quantised = f"{imports}\n{more}", f"    quantization_config={made},\n"
    return f"""\
import torch
{imports}

model = {deployment.recipe.loader}.from_pretrained(
    {json.dumps(str(deployment.checkpoint))},
    device_map={json.dumps(candidate.device_map)},
{max_memory}{quantised}    dtype=torch.{deployment.dtype},
).eval()"""


def _balanced(trials: Trials, workload: Workload, free: dict[int, int]) -> Recommendation | None:
    """``max_memory`` under which all cards come out equally full, given what a run needed beside
    the weights; None where not even one sample fits, or where no map could gain enough."""
    fitting = workload
    while not trials.run(fitting).fits:
        if fitting.batch_size == 1:
            return None
        fitting = replace(fitting, batch_size=fitting.batch_size // 2)
    devices = trials.run(fitting).devices
    scale = workload.batch_size / fitting.batch_size
    extra = [scale * (device.peak_reserved_bytes - device.weights_bytes) for device in devices]
    full = [device.weights_bytes + size for device, size in zip(devices, extra, strict=True)]
    level = sum(full) / len(full)
    if max(full) - level < _WORTH_BYTES:
        return None
    wanted = [max(0.0, level - size) for size in extra[1:-1]]
    found = []
    # accelerate keeps room for the largest block on card 0 and fills the last card with what is
    # left; how far a limit must be above what is meant is therefore tried out.
    for above in (0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6):
        sizes = [max(0.0, level - extra[0] + above * GIB), *wanted, free[len(devices) - 1]]
        # Rounded down, so that nobody is promised more than a card has.
        tenths = [math.floor(min(size, free[n]) / GIB * 10) for n, size in enumerate(sizes)]
        max_memory = {card: f"{size / 10}GiB" for card, size in enumerate(tenths)}
        placement = trials.deployment.plan("auto", max_memory)
        candidate = Recommendation("auto", max_memory, placement)
        weights = trials.deployment.weights_bytes(placement)
        if candidate.on_cards_only:
            found.append((max(weights[card] + size for card, size in enumerate(extra)), candidate))
    return min(found, key=lambda pair: pair[0])[1] if found else None


def _most_text_tokens(recipe: Recipe, workload: Workload) -> int:
    answer = 0 if workload.train else recipe.answer_positions(workload.new_tokens)
    images = workload.images and workload.images * recipe.image_positions
    return max(0, recipe.context - images - answer)


def _largest_that_fits(
    trials: Trials, workload: Workload, size_of: str, most: int, guess: int
) -> int:
    """The largest size of a field, up to ``most``, whose workload fits, 0 if none.

    The prefill is cheap, and what does not get through it cannot decode: its edge is found first
    and the decode steps are run from there down.
    """

    def fits(size: int, new_tokens: int = workload.new_tokens) -> bool:
        return trials.run(replace(workload, **{size_of: size}, new_tokens=new_tokens)).fits

    size = bisect(lambda size: fits(size, new_tokens=0), most, guess)
    if size and workload.new_tokens > 1 and not workload.train:
        # So many that the KV cache, at the end, takes what the weights leave free.
        free = sum(memory.free_bytes for memory in trials.rig.memory())
        deployment = trials.deployment
        one, two = (
            deployment.recipe.cache_bytes(
                replace(workload, **{size_of: number}), DTYPES[deployment.dtype].itemsize
            )
            for number in (1, 2)
        )
        guess = size if one is None else min(size, 1 + (free - one) // (two - one))
        size = bisect(fits, size, max(1, guess))
    return size


def bisect(fits: Callable[[int], bool], most: int, guess: int) -> int:
    """The largest number from 1 to ``most`` that fits, 0 if none; from the guess, in doubling
    steps."""
    low, high, step = 0, most + 1, max(1, guess // 16)
    tried = guess
    while high - low > 1:
        tried = min(max(tried, low + 1), high - 1)
        if fits(tried):
            low = tried
        else:
            high = tried
        if 0 < low and high <= most:
            tried = (low + high) // 2
        else:  # only one side of the edge is known
            tried = high - step if high <= most else low + step
            step *= 2
    return low
