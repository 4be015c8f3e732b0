"""Tensor parallel: several processes, each with a card and a part of every layer."""

from glm4v_nb.parallel.loading import load_rank
from glm4v_nb.parallel.plan import PLAN, check_count
from glm4v_nb.parallel.ranks import RankLost, Ranks

__all__ = ["PLAN", "RankLost", "Ranks", "check_count", "load_rank"]
