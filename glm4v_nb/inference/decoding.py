"""The ladder of decoding methods, from transformers' plain loop to fused kernels."""

import warnings

import torch

from glm4v_nb.inference import fast
from glm4v_nb.inference.supported import why_not

# Each step of transformers' own, as arguments of generate; on CUDA a static cache is compiled.
_ARGUMENTS = {
    "eager": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "compiled": {"cache_implementation": "static"},
}
_FUSED = ("fast", "lookup")
DECODING = (*_ARGUMENTS, *_FUSED)


def set_decoding(model, decoding: str):
    """Say how the model's answers are decoded from now on.

    - ``"eager"``: transformers' own loop, its cache growing with every token;
    - ``"static"``: its static cache, of a fixed length;
    - ``"compiled"``: that, compiled and in CUDA graphs, as transformers does on CUDA;
    - ``"fast"``: fused kernels, one graph a card (needs Triton and cards since Ampere);
    - ``"lookup"``: as fast, and several tokens verified in one step (prompt lookup).

    Where the last two cannot be had a warning says why, and what is taken instead.

    Raises:
        ValueError: another name.
    """
    if decoding not in DECODING:
        raise ValueError(
            f"decoding is {decoding!r}; expected one of {', '.join(DECODING)}. 'fast' gives the"
            " same answers as 'eager', in less time."
        )
    previous = getattr(model, "fast_decoder", None)
    if previous is not None:
        previous.release()
    model.decoding = decoding
    model.fast_decoder = fast.FastDecoder(decoding == "lookup") if decoding in _FUSED else None
    _rung(model)


def arguments(model, streamer) -> dict:
    """How this model's answers are decoded, and streamed, as arguments of its ``generate``."""
    rung = _rung(model)
    # Looking through the model takes milliseconds, so it is not done once more.
    fused = {"custom_generate": model.fast_decoder.decode} if rung in _FUSED else None
    return {**(fused or _ARGUMENTS[rung]), "streamer": streamer}


def _rung(model) -> str:
    """What was asked for, or the rung below where it cannot be had, with a warning."""
    decoding = getattr(model, "decoding", "eager")
    reason = why_not(model) if decoding in _FUSED else None
    if reason is None:
        return decoding
    on_card = torch.cuda.is_available() and model.lm_head.weight.is_cuda
    # What ranks exchange is not compiled.
    below = "compiled" if on_card and not hasattr(model, "ranks") else "eager"
    warnings.warn(f"No {decoding} decoding: {reason}; {below} is taken instead.", stacklevel=3)
    return below
