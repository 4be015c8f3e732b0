"""The one thread that owns the model: requests join between two steps, and leave when they end.

Prompts are run one at a time, then every request that runs gets a token a step. A request takes a
row of the cache, all of which is there from the start, so that what was let in always fits.
"""

import heapq
import logging
import threading
import time
from collections import deque

import torch

from glm4v_nb.cleanup import clear_frames, empty_caches
from glm4v_nb.serving.cache import STEPS, RowCache, prefill
from glm4v_nb.serving.job import Done, Failure, Job
from glm4v_nb.serving.metrics import Metrics
from glm4v_nb.serving.protocol import Refusal

log = logging.getLogger(__name__)

_OUT_OF_MEMORY = Failure(
    503,
    "out_of_memory",
    "A card ran out of memory, though this was predicted to fit: something else may use it. The"
    " service goes on. Ask again, with a shorter prompt if it happens again.",
)
_BROKEN = Failure(500, "internal_error", "The model failed at this request; the log says how.")
_GONE = Failure(499, "client_gone", "The client hung up.")
ENDING = ("shutting_down", "The service is shutting down. Ask again when it is back.")


class Engine:
    """Answers jobs until ``stop``; ``start`` begins its thread.

    Args:
        model: from ``load``.
        cache: one row for each request that may run at a time.
        decoding: "eager", or "fast" for fused kernels.
        queue: how many requests may wait besides.
        metrics: what is counted.

    Attributes:
        alive: False once a card is in a state that only a new process gets it out of.
    """

    def __init__(self, model, cache: RowCache, decoding: str, queue: int, metrics: Metrics):
        self.model, self.cache, self.metrics = model, cache, metrics
        self.most = cache.sequences + queue
        self.alive, self.draining = True, False
        self._steps = STEPS[decoding](model, cache)
        ids = model.generation_config.eos_token_id
        self._end_ids = set(ids if isinstance(ids, list) else [ids])
        self._inside = 0  # requests that are prepared, wait or run
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []  # the one that joined first is first
        self._free = list(range(cache.sequences))
        self._stopped, self._ended, self._deadline = False, False, float("inf")
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        metrics.waiting.set_function(lambda: len(self._waiting))
        metrics.running.set_function(lambda: len(self._running))
        metrics.positions.set_function(lambda: sum(job.slot + 1 for job in [*self._running]))

    def start(self):
        self._thread.start()

    def reserve(self):
        """Take a place for a request, before its body is read.

        Raises:
            Refusal: all are taken (429), or the service is ending (503).
        """
        with self._changed:
            if self.draining or not self.alive:
                raise Refusal(503, *ENDING)
            if self._inside >= self.most:
                raise Refusal(
                    429,
                    "queue_full",
                    f"{self._inside} requests are answered or wait already, and no more are let in."
                    " Ask again in a few seconds.",
                )
            self._inside += 1

    def release(self):
        """Give the place of a request back that was never submitted."""
        with self._changed:
            self._inside -= 1

    def submit(self, job: Job):
        """Put a job into the queue; its place is given back when it ends.

        Raises:
            Refusal: the engine has ended since the place was taken.
        """
        with self._changed:
            if self._ended:
                self._inside -= 1
                raise Refusal(503, *ENDING)
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job):
        """Let a job end before the next step; its row is free then."""
        with self._changed:
            job.cancelled = True
            self._changed.notify()

    def drain(self, grace_seconds: float = float("inf")):
        """Let in nothing more, and end what waits; what runs has so long. For signal handlers."""
        self._deadline = time.monotonic() + grace_seconds
        self.draining = True

    def stop(self):
        """End what runs, and the thread."""
        with self._changed:
            self.draining = self._stopped = True
            self._changed.notify()
        self._thread.join()

    def _work(self):
        try:
            self._run()
        except Exception as error:  # one of the engine itself: better to start anew than to hang
            log.critical("the engine has failed at %s: %s", where(error), type(error).__name__)
            self.alive = False
        with self._changed:
            self._ended = True
        for job in self._all():
            self._leave(job, Failure(503, *ENDING))

    def _run(self):
        while not self._stopped and self.alive:
            with self._changed:
                # Wakes by itself as a signal handler, which drains, must not take the lock.
                if not self._running and not self._waiting:
                    self._changed.wait(timeout=0.5)
            self._sweep()
            if self._waiting and self._free:
                self._join()
            if self._running:
                self._step()

    def _all(self) -> list[Job]:
        with self._changed:
            return [*self._running, *self._waiting]

    def _sweep(self):
        """End what was given up, and what waits when the service ends."""
        for job in self._all():
            if job.cancelled:
                self._leave(job, _GONE)
            elif self.draining and (job.row is None or time.monotonic() > self._deadline):
                self._leave(job, Failure(503, *ENDING))

    def _join(self):
        """Run a prompt into a free row; the request's first token comes of it."""
        with self._changed:
            job = self._waiting.popleft()
            # The lowest: a step runs all rows up to the highest.
            job.row = heapq.heappop(self._free)
            self._running.append(job)
        try:
            logits = prefill(self.model, job.inputs, self.cache, job.row)
            del job.inputs
            likeliest = int(logits.argmax())
        except Exception as error:
            self._fail([job], error)
            return
        self.metrics.first_token.observe(time.monotonic() - job.asked)
        self.metrics.prompt_tokens.inc(job.prompt_positions)
        self._add(job, logits, likeliest)

    def _step(self):
        """One token for every request that runs."""
        jobs = list(self._running)
        state = [(job.row, job.token, job.position, job.slot) for job in jobs]
        try:
            logits = self._steps(*map(list, zip(*state, strict=True)))
            likeliest = logits.argmax(-1).tolist()
        except torch.OutOfMemoryError as error:
            # The youngest gives way. The others are tried again: a step writes the same once more.
            self._fail(jobs[-1:], error)
        except Exception as error:
            self._fail(jobs, error)
        else:
            for each in zip(jobs, logits, likeliest, strict=True):
                self._add(*each)

    def _add(self, job: Job, logits: torch.Tensor, likeliest: int):
        """A token for one request, whose faults are no other's."""
        try:
            done = job.add(job.choose(logits, likeliest), self._end_ids)
        except Exception as error:
            self._fail([job], error)
            return
        self.metrics.new_tokens.inc()
        if done:
            self._leave(job, done)

    def _fail(self, jobs: list[Job], error: Exception):
        out_of_memory = isinstance(error, torch.OutOfMemoryError)
        self.alive = self.alive and not isinstance(error, torch.AcceleratorError)
        # The message may hold what was asked; that of an out-of-memory error has figures only.
        said = str(error) if out_of_memory else type(error).__name__
        log.error("%d request(s) failed at %s: %s", len(jobs), where(error), said)
        clear_frames(error)  # which hold tensors
        for job in jobs:
            self._leave(job, _OUT_OF_MEMORY if out_of_memory else _BROKEN)
        empty_caches()

    def _leave(self, job: Job, end: Done | Failure):
        """Give back what a job has, and say how it ended."""
        with self._changed:
            if job.row is None:
                self._waiting.remove(job)
            else:
                self._running.remove(job)
                heapq.heappush(self._free, job.row)
            self._inside -= 1
        reason = end.finish if isinstance(end, Done) else end.code
        self.metrics.finished.labels(reason).inc()
        took = time.monotonic() - job.asked
        log.info(
            "%s after %.2f s: %d positions asked, %d tokens answered",
            reason, took, job.prompt_positions, job.new_tokens,
        )  # fmt: skip
        job.tell(end)


def where(error: BaseException) -> str:
    """File and line of the innermost frame."""
    trace = error.__traceback__
    while trace.tb_next:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
