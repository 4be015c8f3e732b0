"""``Monitor``: samples the memory of every card while a program runs, one JSON object a line."""

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from simgpu.readings import MachineReadings, SimulatedReadings
from simgpu.units import MIB

# On simulated cards: a sample when a card has changed by this much, when it falls from a peak that
# is this much above the last one sampled, and at the latest after so many events.
STEP_BYTES = 16 * MIB
PEAK_BYTES = MIB
STEP_EVENTS = 2000


class Monitor:
    """Samples every card from the begin of a ``with`` block to its end, and names the stage of each
    sample.

    Real devices are sampled by a thread, every ``interval_seconds``. What rises and falls between
    two samples is not seen; each sample therefore also holds the allocator's own peaks since the
    stage began. Simulated cards run far faster than real ones and have no clock: they are sampled
    as bytes are allocated and released, whenever a card has changed by 16 MiB, at peaks (none is
    missed by more than 1 MiB), and when a stage begins. All are sampled when a stage ends.

    A line holds ``time`` (seconds since 1970), ``event`` (allocations and releases since the
    monitor began; null on real devices), ``process`` (its id), ``provenance``, ``stages`` (names of
    those that are running, outermost first) and ``cards``, as ``readings`` describes
    them, sizes in bytes. Several processes may append to one file, and several monitors may watch
    one rig.

    Args:
        rig: any, simulated or real.
        path: the file to append to; made if missing.
        interval_seconds: from one sample of real devices to the next.
        cache: transformers' KV cache, to tell it from activations on real devices; not kept alive.
        on_sample: called with each sample, for a display. It must be quick, and is called from the
            sampling thread.

    Attributes:
        samples: how many were written.
        sampling_seconds: wall clock they took in all.

    Raises:
        OSError: the file cannot be written.
        ValueError: the interval is not positive.
        RuntimeError: sampling failed; raised at the end of the block, with the cause. Sampling
            stops at the error, the program does not. If the block itself ended by an error, that
            one is raised with a note.
    """

    def __init__(
        self,
        rig,
        path: str | Path,
        interval_seconds: float = 0.1,
        *,
        cache=None,
        on_sample: Callable[[dict], None] | None = None,
    ):
        if not interval_seconds > 0:
            raise ValueError(
                f"interval_seconds is {interval_seconds!r}; expected seconds above 0. 0.1 costs"
                " little."
            )
        self.rig, self.path, self.interval_seconds = rig, Path(path), interval_seconds
        self.samples, self.sampling_seconds = 0, 0.0
        self._on_sample, self._cache = on_sample, cache
        self._error: BaseException | None = None

    def __enter__(self) -> "Monitor":
        self._file = open(self.path, "a", encoding="utf-8")
        self._busy, self._stop = threading.Lock(), threading.Event()
        self._provenance = self.rig.provenance
        # Stages that ended before do not matter, and there may be many.
        self._first_stage = next(
            (number for number, stage in enumerate(self.rig.stages) if not stage.memory),
            len(self.rig.stages),
        )
        # Only simulated cards have an allocator that can be listened to.
        allocators = getattr(self.rig, "allocators", None)
        if allocators is None:
            self._cards = MachineReadings(self.rig, self._cache)
            self._listener = None
            self._thread = threading.Thread(target=self._run, name="simgpu monitor", daemon=True)
        else:
            self._cards = SimulatedReadings(self.rig)
            self._listener = _Listener(allocators, self.stages, self._try_sample)
            self._thread = None
        self._cache = None
        self._try_sample()
        self.rig.watchers.append(self._try_sample)
        if self._listener:
            self._listener.start()
        else:
            self._thread.start()
        return self

    def __exit__(self, kind, error, traceback):
        self._stop.set()
        self.rig.watchers.remove(self._try_sample)
        if self._listener:
            self._listener.stop()
        else:
            self._thread.join()
        if self._error is None:
            self._try_sample()
        self._cards.close()
        self._file.close()
        if self._error is None:
            return
        message = (
            f"The memory monitor stopped after {self.samples} samples, by"
            f" {type(self._error).__name__}: {self._error}. Expected to sample to the end of its"
            f" block. The program ran on and {self.path.name} is complete up to there; see to the"
            " cause, or leave the monitor out."
        )
        if error is None:
            raise RuntimeError(message) from self._error
        error.add_note(message)

    def stages(self) -> list[str]:
        """Names of the stages that are running, outermost first."""
        # A stage's figures are filled in when it ends.
        return [stage.name for stage in self.rig.stages[self._first_stage :] if not stage.memory]

    def _run(self):
        due = time.monotonic()
        while self._error is None:
            due = max(due + self.interval_seconds, time.monotonic())
            if self._stop.wait(due - time.monotonic()):
                return
            self._try_sample()

    def _try_sample(self):
        # An allocation inside a sample, or in another thread meanwhile, is no reason for one.
        if self._error is not None or not self._busy.acquire(blocking=False):
            return
        try:
            self._sample()
        except Exception as error:
            self._error = error
        finally:
            self._busy.release()

    def _sample(self):
        begin = time.perf_counter()
        sample = {
            "time": round(time.time(), 4),
            "event": self._listener.events if self._listener else None,
            "process": os.getpid(),
            "provenance": self._provenance,
            "stages": self.stages(),
            "cards": self._cards.read(),
        }
        # One write a line, flushed: whole if the process is killed, and lines of two do not mix.
        self._file.write(json.dumps(sample) + "\n")
        self._file.flush()
        if self._on_sample is not None:
            self._on_sample(sample)
        self.samples += 1
        self.sampling_seconds += time.perf_counter() - begin


class _Listener:
    """Calls ``sample`` before those allocations and releases of simulated cards that the monitor
    wants to see.

    Before, not after: by then everything on the card is in ``rig.blocks``, and the failed request
    of an out-of-memory error comes after a sample too.
    """

    def __init__(self, allocators, stages: Callable[[], list[str]], sample: Callable[[], None]):
        self.allocators, self.stages, self.sample = allocators, stages, sample
        self.events = 0
        self._sampled_event = 0
        self._sampled_stages = stages()
        self._sampled_bytes = [allocator.allocated for allocator in allocators]
        self._sampled_peaks = list(self._sampled_bytes)

    def start(self):
        for allocator in self.allocators:
            allocator.listeners.append(self._before)

    def stop(self):
        for allocator in self.allocators:
            allocator.listeners.remove(self._before)

    def _before(self, allocator, releases: bool):
        index, now, stages = allocator.index, allocator.allocated, self.stages()
        if releases:
            # Only where it ends a peak: what is being released is no longer among the blocks.
            above = now - self._sampled_peaks[index]
            wanted = now == allocator.peak_allocated and above >= PEAK_BYTES
        else:
            wanted = (
                abs(now - self._sampled_bytes[index]) >= STEP_BYTES
                or self.events - self._sampled_event >= STEP_EVENTS
                or stages != self._sampled_stages
            )
        if wanted:
            if stages != self._sampled_stages:  # whose peaks begin anew
                self._sampled_peaks = [each.allocated for each in self.allocators]
            self._sampled_event, self._sampled_stages = self.events, stages
            self._sampled_bytes = [each.allocated for each in self.allocators]
            self._sampled_peaks[index] = max(self._sampled_peaks[index], now)
            self.sample()
        self.events += 1


def read_samples(path: str | Path) -> list[dict]:
    """The samples of a monitor's file, in the order written; a last line that was cut off is left
    out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is no sample.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is no file. Expected what a Monitor wrote. Check the path, or whether a"
            " monitor ran."
        )
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines()
    samples = []
    for number, line in enumerate(lines, start=1):
        try:
            sample = json.loads(line)
            if not {"time", "stages", "cards"} <= set(sample):
                raise ValueError("no time, stages and cards")
        except (ValueError, TypeError) as error:
            if number == len(lines) and not text.endswith("\n"):
                break  # the process was killed as it wrote
            raise ValueError(
                f"{path}, line {number}: {error}. Expected one sample of a Monitor a line. Is it"
                " another log, or was it edited? Remove the line, or give the right file."
            ) from None
        samples.append(sample)
    return samples
