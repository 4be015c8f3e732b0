"""Tensor parallel: several processes, each with a card and a part of every layer."""

from glm4v_nb.parallel.loading import load_rank
from glm4v_nb.parallel.plan import PLAN, check_count
from glm4v_nb.parallel.ranks import Ranks
from glm4v_nb.parallel.telling import RankLost, told

__all__ = ["PLAN", "RankLost", "Ranks", "check_count", "load_rank", "told"]
