"""What ends one rank is told to the others, which would wait for it for minutes.

Whatever all ranks call together has a number, the same on each. A rank that fails in it leaves word
in the store by which torchrun's processes met. If the others do not end as well in a moment, it
leaves the group: those that wait on the CPU are woken, and raise what it left. A card that waits
for another cannot be woken; there a thread says what was left, and ends the process.
"""

import itertools
import os
import sys
import threading
import time
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from functools import cache

import torch.distributed as dist

# In which ranks that fail alike have all failed.
GRACE_SECONDS = 3
# After which a rank that still waits for one that failed is ended. The kernels that wait for
# another rank give up before (``exchange.LOOKS``).
END_SECONDS = 20
_POLL_SECONDS = 0.1
_MOST_CHARACTERS = 300
_NUMBERS = itertools.count(1)
_CURRENT: ContextVar["Call | None"] = ContextVar("call", default=None)


class RankLost(RuntimeError):
    """Another of the processes has failed or ended, or does not answer."""


@contextmanager
def told(ranks):
    """Within it all ranks do the same, and learn what ends another's; within another it is part of
    that. ``ranks`` may be None, for a model that nobody shares.

    Raises:
        RankLost: from what waits for the others, where one has failed.
    """
    alone = ranks is None or ranks.count == 1 or not ranks.exchanges
    # Processes that something else than torchrun started may have no store that outlives them.
    if alone or _CURRENT.get() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        yield
        return
    call = Call(ranks.rank, ranks.count)
    before = _CURRENT.set(call)
    threading.Thread(target=call.watch, daemon=True).start()
    try:
        yield
        call.say("done")
    except RankLost:
        raise
    except BaseException as error:
        with suppress(RuntimeError):  # the store's; torchrun is ending all
            call.fail(error)
        raise
    finally:
        call.ended.set()
        _CURRENT.reset(before)


def failure() -> str | None:
    """Which other rank has failed in what all are doing now, and how, in a sentence."""
    call = _CURRENT.get()
    with suppress(RuntimeError):
        return call and call.failure()


def meet(patience: timedelta):
    """Wait until all ranks are here, before they join; RankLost if one has failed before."""
    call, end = _CURRENT.get(), time.monotonic() + patience.total_seconds()
    if call is None:
        return
    call.say("here")
    while len(call.heard()) < call.count - 1 and time.monotonic() < end:
        time.sleep(_POLL_SECONDS)
    if words := call.failure():
        raise RankLost(words)


class Call:
    """Something that all ranks do, on this one.

    Attributes:
        ended: set when it is done here, or has failed.
    """

    def __init__(self, rank: int, count: int):
        self.rank, self.count, self.number = rank, count, next(_NUMBERS)
        self.ended = threading.Event()

    def say(self, how: str, words: str = ""):
        """Leave word of how it stands here: "here", "done" or "failed"."""
        _store().set(str(self.rank), f"{self.number} {how} {words}")

    def heard(self) -> dict[int, tuple[str, str]]:
        """How it stands with the other ranks that have left word of it, and their words."""
        found = {}
        for rank in range(self.count):
            if rank != self.rank and _store().check([str(rank)]):
                number, how, words = _store().get(str(rank)).decode().split(" ", 2)
                if int(number) >= self.number:  # one that does the next is done with this
                    found[rank] = (how, words) if int(number) == self.number else ("done", "")
        return found

    def failure(self) -> str | None:
        """See the function of this name."""
        for rank, (how, words) in self.heard().items():
            if how == "failed":
                return f"Rank {rank} of {self.count} failed, and all end with it: {words}"
        return None

    def fail(self, error: BaseException):
        """Leave word of this rank's error, and the group where others do not end as well."""
        words = " ".join(f"{type(error).__name__}: {error}".split())
        self.say("failed", words[:_MOST_CHARACTERS])
        end = time.monotonic() + GRACE_SECONDS
        while sum(how != "here" for how, _ in self.heard().values()) < self.count - 1:
            if time.monotonic() > end:
                error.add_note(f"Rank {self.rank} of {self.count} failed, and all end with it.")
                if dist.is_initialized() and dist.get_backend() == "gloo":
                    dist.destroy_process_group()
                return
            time.sleep(_POLL_SECONDS)

    def watch(self):
        """End the process where it goes on waiting for a rank that has failed."""
        with suppress(RuntimeError):
            while not self.ended.wait(1):
                if words := self.failure():
                    if not self.ended.wait(END_SECONDS):
                        print(f"error: {words}", file=sys.stderr, flush=True)
                        os._exit(1)
                    return


@cache
def _store() -> dist.Store:
    """torchrun's own, to which the ranks' own process is a client."""
    store, *_ = next(dist.rendezvous("env://", timeout=timedelta(seconds=30)))
    return dist.PrefixStore("glm4v_nb", store)
