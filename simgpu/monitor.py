"""``Monitor``: samples the memory of every card while a program runs, one JSON object a line."""

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from simgpu.readings import MachineReadings, SimulatedReadings
from simgpu.units import MIB

# On simulated cards: a sample when a card has changed by this much, when it falls from a peak of
# the stage that is this much above the last one sampled, and at the latest after so many events.
STEP_BYTES = 16 * MIB
PEAK_BYTES = MIB
STEP_EVENTS = 2000


class Monitor:
    """Samples every card in its ``with`` block, and names the stage of each sample.

    Real devices are sampled by a thread, every ``interval_seconds``. What rises and falls between
    two samples is not seen; each sample therefore also holds the allocator's own peaks since the
    stage began. Simulated cards run far faster than real ones and have no clock: they are sampled
    as bytes are allocated and released, whenever a card has changed by 16 MiB, before it falls from
    where it has risen by as much, at a stage's peaks (none is missed by more than 1 MiB), and when
    a stage begins. All are sampled when a stage ends.

    A line holds ``time`` (seconds since 1970), ``event`` (allocations and releases since the
    monitor began; null on real devices), ``process`` (its id), ``provenance``, ``stages`` (names of
    those that are running, outermost first) and ``cards``, as ``readings`` describes them, in
    bytes. Several processes may append to one file, and several monitors may watch one rig.

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
            found = f"interval_seconds is {interval_seconds!r}"
            raise ValueError(f"{found}; expected seconds above 0. 0.1 costs little.")
        self.rig, self.path, self.interval_seconds = rig, Path(path), interval_seconds
        self.samples, self.sampling_seconds = 0, 0.0
        self._on_sample, self._cache = on_sample, cache
        self._error: Exception | None = None

    def __enter__(self) -> "Monitor":
        self._file = open(self.path, "a", encoding="utf-8")
        self._busy = threading.Lock()
        self._provenance = self.rig.provenance
        # Only simulated cards have an allocator that can be listened to.
        if hasattr(self.rig, "allocators"):
            self._readings = SimulatedReadings(self.rig)
            self._sampler = _Listener(self.rig, self._try_sample)
        else:
            self._readings = MachineReadings(self.rig, self._cache)
            self._sampler = _Clock(self.interval_seconds, self._try_sample)
        self._cache = None
        self._try_sample()
        self.rig.watchers.append(self._try_sample)
        self._sampler.start()
        return self

    def __exit__(self, kind, error, traceback):
        self.rig.watchers.remove(self._try_sample)
        self._sampler.stop()
        self._try_sample()
        self._readings.close()
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
            "event": self._sampler.events,
            "process": os.getpid(),
            "provenance": self._provenance,
            "stages": list(self.rig.running),
            "cards": self._readings.read(),
        }
        # One write a line, flushed: whole if the process is killed, and lines of two do not mix.
        self._file.write(json.dumps(sample) + "\n")
        self._file.flush()
        if self._on_sample is not None:
            self._on_sample(sample)
        self.samples += 1
        self.sampling_seconds += time.perf_counter() - begin


class _Clock(threading.Thread):
    """Calls ``sample`` every ``interval_seconds``."""

    events = None

    def __init__(self, interval_seconds: float, sample: Callable[[], None]):
        super().__init__(name="simgpu monitor", daemon=True)
        self.interval_seconds, self.sample = interval_seconds, sample
        self._stopped = threading.Event()

    def run(self):
        due = time.monotonic() + self.interval_seconds
        while not self._stopped.wait(due - time.monotonic()):
            self.sample()
            due = max(due + self.interval_seconds, time.monotonic())

    def stop(self):
        self._stopped.set()
        self.join()


class _Listener:
    """Calls ``sample`` before those allocations and releases that the monitor wants to see.

    Before: then all that is on the card is in ``rig.blocks``, and a request that fails is seen too.
    """

    def __init__(self, rig, sample: Callable[[], None]):
        self.allocators, self.stages, self.sample = rig.allocators, rig.running, sample
        self.events = 0
        self._sampled_event = 0
        self._sampled_stages = list(self.stages)
        self._sampled_bytes = [allocator.allocated for allocator in self.allocators]
        self._sampled_peaks = list(self._sampled_bytes)

    def start(self):
        for allocator in self.allocators:
            allocator.listeners.append(self._before)

    def stop(self):
        for allocator in self.allocators:
            allocator.listeners.remove(self._before)

    def _before(self, allocator, releases: bool):
        index, now = allocator.index, allocator.allocated
        in_other_stage = self.stages != self._sampled_stages
        if releases:
            # Only where a rise ends: what is being released is no longer among the blocks. Every
            # layer has such a place, and not only the first is a peak of the stage.
            above = now - self._sampled_peaks[index]
            wanted = now == allocator.peak_allocated and above >= PEAK_BYTES
            wanted = wanted or now - self._sampled_bytes[index] >= STEP_BYTES
        else:
            wanted = (
                abs(now - self._sampled_bytes[index]) >= STEP_BYTES
                or self.events - self._sampled_event >= STEP_EVENTS
                or in_other_stage
            )
        if wanted:
            self._sampled_event, self._sampled_stages = self.events, list(self.stages)
            self._sampled_bytes = [each.allocated for each in self.allocators]
            if in_other_stage:  # whose peaks begin anew
                self._sampled_peaks = list(self._sampled_bytes)
            self._sampled_peaks[index] = max(self._sampled_peaks[index], now)
            self.sample()
        self.events += 1


def read_samples(path: str | Path) -> list[dict]:
    """The samples of a monitor's file, in the order written, without a last line that was cut off.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is no sample.
    """
    path = Path(path)
    if not path.is_file():
        advice = "Check the path, or whether a monitor ran."
        raise FileNotFoundError(f"{path} is no file. Expected what a Monitor wrote. {advice}")
    text = path.read_text(encoding="utf-8", errors="replace")
    lines, samples = text.splitlines(), []
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
