"""The processes that share one model: started by torchrun, they add up and agree here."""

import hashlib
import os
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from glm4v_nb.parallel.telling import RankLost, failure, meet

_STARTED_WITH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# The longest that one waits for another, which may still be reading its weights.
PATIENCE = timedelta(minutes=10)
# As PyTorch calls it since 2.13; before that it is the other.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Ranks:
    """This process among those that share a model.

    Attributes:
        rank, count: which it is, from 0, of how many.
        device: where its part of the model is.
        exchanges: False for a rank that is looked at alone, as on simulated cards: it allocates
            what it would among the others, and nothing comes from them.
    """

    rank: int
    count: int
    device: torch.device = torch.device("cpu")
    exchanges: bool = True

    @classmethod
    def started(cls) -> "Ranks":
        """This process as torchrun has started it: on the GPU of its number, or on the CPU.

        Raises:
            ValueError: not started by torchrun, or with other variables than it sets, or there are
                fewer GPUs than processes here.
        """
        if missing := [name for name in _STARTED_WITH if name not in os.environ]:
            raise ValueError(
                f"parallel is 'tensor', but the environment has no {missing[0]}. Expected a process"
                " for each card, started by torchrun. Start the program with: torchrun"
                " --nproc-per-node 2 PROGRAM"
            )
        found = [os.environ[name] for name in _STARTED_WITH[:3]]
        if not all(each.isdecimal() for each in found) or int(found[0]) >= int(found[2]):
            named = ", ".join(map("{} {!r}".format, _STARTED_WITH, found))
            raise ValueError(
                f"The environment has {named}. Expected numbers from 0, RANK below WORLD_SIZE. Let"
                " torchrun set them, and set none of them yourself."
            )
        rank, local, count = map(int, found)
        if not torch.cuda.is_available():
            return cls(rank, count)
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"This is process {local} of this machine, which has {torch.cuda.device_count()}"
                " GPUs. Expected one for each process. Give torchrun that --nproc-per-node."
            )
        return cls(rank, count, torch.device("cuda", local))

    def join(self):
        """Meet the others; what the program has joined itself is kept.

        Raises:
            RankLost: they do not come.
            ValueError: the program has joined others than those of torchrun.
        """
        on_card = self.device.type == "cuda"
        if on_card:
            torch.cuda.set_device(self.device)
        if not dist.is_initialized():
            meet(PATIENCE)
            with self._together():
                dist.init_process_group(
                    "nccl" if on_card else "gloo",
                    timeout=PATIENCE,
                    device_id=self.device if on_card else None,
                )
        joined = dist.get_rank(), dist.get_world_size()
        if joined != (self.rank, self.count):
            raise ValueError(
                f"torchrun started this process as rank {self.rank} of {self.count}, but the"
                f" program has joined a process group as {joined[0]} of {joined[1]}. Expected the"
                " same. Leave init_process_group to this library, or give it torchrun's numbers."
            )

    def add_up(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of the tensors of all ranks, in the place of this one's."""
        if self.exchanges:
            with self._together():
                dist.all_reduce(part)
        return part

    def join_features(self, part: torch.Tensor) -> torch.Tensor:
        """(..., features) of every rank as (..., count x features), in the order of the ranks."""
        whole = part.new_empty(self.count * part.numel())
        if self.exchanges:
            with self._together():
                _gather(whole, part.flatten())
        return whole.view(self.count, *part.shape).movedim(0, -2).flatten(-2)

    def numbers(self, number: int) -> list[int]:
        """The whole numbers of all ranks, each below 2 ** 63."""
        own = torch.tensor([number], device=self.device)
        return self.join_features(own).tolist() if self.exchanges else [number]

    def agree(self, asked: Iterable):
        """Compare what the ranks are asked: tensors, and what has the same ``repr`` everywhere.

        Raises:
            ValueError: they were asked different things, and would wait for each other in different
                places.
        """
        if not self._alike(asked):
            raise ValueError(
                "The ranks were asked different things. Expected the same conversation, pictures"
                " and sampling on every rank. Read them from the same place, and draw nothing."
            )

    def draw_alike(self):
        """From now on all ranks draw the same: what they were seeded for, if all were, and else
        what the first draws a seed for."""
        on_card = self.device.type == "cuda"
        state = torch.cuda.get_rng_state(self.device) if on_card else torch.get_rng_state()
        if not self._alike([state]):
            torch.manual_seed(self.numbers(int(torch.randint(2**62, ())))[0])

    def _alike(self, asked: Iterable) -> bool:
        digest = hashlib.sha256()
        for one in asked:
            if torch.is_tensor(one):
                one = one.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            digest.update(one if isinstance(one, bytes) else repr(one).encode())
        return len(set(self.numbers(int.from_bytes(digest.digest()[:7])))) == 1

    @contextmanager
    def _together(self):
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:  # ValueError: this rank has left
            raise self.lost(" ".join(str(error).split())[:120]) from error

    def lost(self, reason: str) -> RankLost:
        """The error to raise where another rank is missed."""
        return RankLost(
            failure()
            or f"Rank {self.rank} of {self.count} does not reach the others ({reason}). Expected"
            " all of them to run until the end. One has ended: read its own message, or torchrun's"
            " report of which and how, then start all again."
        )
