"""Loading a checkpoint and asking it questions: whole answers, or streamed ones to stop."""

from glm4v_nb.inference.decoding import DECODING, set_decoding
from glm4v_nb.inference.generation import Answer, Sampling, Stream, generate, stream
from glm4v_nb.inference.loading import load

__all__ = ["DECODING", "Answer", "Sampling", "Stream", "generate", "load", "set_decoding", "stream"]
