"""A log of a run's stages: one JSON object a line, appended as each stage ends."""

import json
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path


@contextmanager
def logged_stage(rig, name: str, path: str | Path):
    """Name a part of a run as ``rig.stage`` does; when it ends its record is appended to a log.

    A line holds ``time`` (of the end, ISO 8601 with zone), ``stage``, ``provenance`` ("simulated"
    or "measured on ..."), ``memory`` (per card the fields of ``CardMemory``, sizes in bytes),
    ``out_of_memory`` (PyTorch's message or null) and ``error`` (any other error that ended the
    stage, or null).

    Args:
        rig: simulated cards or this machine's own.
        path: the log; made if missing, never overwritten.

    Raises:
        OSError: the log cannot be written; before the stage begins.
    """
    with open(path, "a", encoding="utf-8") as log:
        ended_by = None
        try:
            with rig.stage(name) as stage:
                yield stage
        except BaseException as error:
            ended_by = f"{type(error).__name__}: {error}"
            raise
        finally:
            record = {
                "time": datetime.now().astimezone().isoformat(timespec="seconds"),
                "stage": name,
                "provenance": rig.provenance,
                "memory": [memory.to_dict() for memory in stage.memory],
                "out_of_memory": stage.out_of_memory,
                "error": None if stage.out_of_memory else ended_by,
            }
            log.write(json.dumps(record) + "\n")
