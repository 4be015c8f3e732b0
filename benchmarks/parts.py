"""Parts of a benchmark, each in processes of its own, which may fail without the others."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Part:
    """What is run, and how.

    Attributes:
        run: takes the program's arguments.
        seconds: after which it is ended.
        by_torchrun: whether as a process for each card.
        alone: False for a part that times nothing: such parts run beside each other.
    """

    run: Callable
    seconds: float
    by_torchrun: bool = False
    alone: bool = True


def run_parts(
    parts: Mapping[str, Part], program: Path, options: list, scratch: Path, count: int,
    environments: Mapping[str, dict],
) -> Iterator[str]:  # fmt: skip
    """Run a program once for each part, with ``--part`` and its name; yields each that has ended.

    What it says on stderr is then in NAME.log of ``scratch``, and there is a NAME.failed if it
    failed. ``environments`` are what a part has beside this process's.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    begun = {}
    for name, part in parts.items():
        beside = [name] if part.alone else [each for each in parts if not parts[each].alone]
        for each in beside:
            if each not in begun:
                for file in scratch.glob(f"{each}.*"):
                    file.unlink()
                begin = ["-m", "torch.distributed.run", "--nproc-per-node", count]
                begin += ["--master-port", 29640 + list(parts).index(each)]
                command = [sys.executable, "-u", *(begin if parts[each].by_torchrun else ())]
                command += [program, "--part", each, *options]
                environment = os.environ | environments.get(each, {})
                with (scratch / f"{each}.log").open("w") as log:
                    process = subprocess.Popen(list(map(str, command)), stderr=log, env=environment)
                begun[each] = process, time.time()
        process, begin = begun[name]
        _wait(process, begin + part.seconds)
        if process.returncode:
            (scratch / f"{name}.failed").touch()
        print(f"{name}: ended with {process.returncode}, {time.time() - begin:.0f} s", flush=True)
        yield name


def _wait(process: subprocess.Popen, until: float):
    """For its end, or end it then; torchrun ends what it has started when it is asked to."""
    for end, how in ((max(1.0, until - time.time()), process.terminate), (10, process.kill)):
        try:
            process.wait(end)
            return
        except subprocess.TimeoutExpired:
            how()
    process.wait()
