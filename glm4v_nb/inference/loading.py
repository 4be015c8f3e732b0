"""``load``: model and processor of a checkpoint, from safetensors files of one pinned revision."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from glm4v_nb.inference.decoding import set_decoding
from glm4v_nb.model import GLM4VForConditionalGeneration
from glm4v_nb.model.chat import IMAGE_TOKENS
from glm4v_nb.model.checkpoint_files import SMALL_FILES, check_files, local_directory
from glm4v_nb.model.configuration import read_config
from glm4v_nb.model.processing import GLM4VProcessor
from glm4v_nb.model.quantising import KEEP, quantiser_for
from glm4v_nb.parallel import Ranks, check_count, load_rank, told


def load(
    checkpoint: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str = torch.bfloat16,
    device_map: str | dict | None = None,
    max_memory: dict | None = None,
    decoding: str = "eager",
    parallel: str | None = None,
    weights: str | None = None,
    keep: Sequence[str] = KEEP,
):
    """Load model and processor, ready to answer.

    With ``parallel="tensor"`` every process that torchrun started loads its part of each layer;
    then all of them ask the same, and each has the answer.

    Args:
        checkpoint: a directory in the official layout, or the id of a repository on the Hugging
            Face hub.
        revision: the repository's commit, 40 hexadecimal digits; required for a hub id, as a name
            such as "main" may stand for other weights tomorrow.
        dtype: of the weights; transformers' "auto" takes what the checkpoint states.
        device_map: as in ``from_pretrained``; by default "auto" where there are GPUs, else the CPU.
        max_memory: as in ``from_pretrained``, bytes or text such as "20GiB" per GPU.
        decoding: how answers are decoded, see ``set_decoding``: "fast" for fused kernels.
        parallel: "tensor", or None for one process that has all of the model.
        weights: "int8", "int4" or "nf4" quantises while loading (docs/quantising.md); a checkpoint
            that was saved quantised needs no word.
        keep: modules that are then left in ``dtype``, by their names here or the official ones.

    Returns:
        (model in evaluation mode, processor)

    Raises:
        FileNotFoundError: a directory that does not exist, or without weights.
        ValueError: a hub id without a pinned revision; a damaged or foreign checkpoint; weights
            that cannot be had here; processes that cannot share the model, or that torchrun has not
            started.
        RankLost: another of the processes has failed, or does not answer.
    """
    if parallel is not None:
        _check_parallel(parallel, device_map, max_memory, decoding, weights)
        ranks = Ranks.started()
        with told(ranks):
            found = _load(checkpoint, revision, dtype, decoding, ranks=ranks)
            ranks.numbers(0)  # a rank that has failed is missed now
        return found
    if device_map is None:
        device_map = "auto" if torch.cuda.is_available() else "cpu"
    options = {"device_map": device_map, "max_memory": max_memory}
    return _load(checkpoint, revision, dtype, decoding, weights, keep, **options)


def _load(checkpoint, revision, dtype, decoding, weights=None, keep=KEEP, ranks=None, **options):
    """As ``load``; ``options`` of ``from_pretrained``, where no ``ranks`` share the model."""
    if not Path(checkpoint).is_dir():
        # A hub id is "owner/name"; anything else was meant as a path.
        if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(checkpoint)):
            raise FileNotFoundError(
                f"{checkpoint} is no directory. Expected a checkpoint's directory, or a hub id such"
                " as zai-org/glm-4v-9b. Check the path."
            )
        if not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
            raise ValueError(
                f"{checkpoint}: revision is {revision!r}, and there is no directory of this name. A"
                " repository on the hub is loaded at one commit only (40 hexadecimal digits), so"
                " that the weights cannot change unnoticed. Take it from"
                f" https://huggingface.co/{checkpoint}/commits/main."
            )
    # What is small first: it fails in a second where the weights would take minutes. The classes
    # by name, not transformers' Auto ones, which let the files choose a class, and code.
    directory = Path(local_directory(checkpoint, SMALL_FILES, revision=revision))
    check_files(directory)
    config = read_config(directory)
    if ranks is not None:
        check_count(config, ranks.count)
    processor = GLM4VProcessor.from_pretrained(directory)
    ids = [config.boi_token_id, config.eoi_token_id]
    named = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKENS[::2])
    if ids != named:
        raise ValueError(
            f"{directory}: boi_token_id and eoi_token_id of config.json are {ids}, but"
            f" tokenizer_config.json gives the image's tokens the ids {named}. Take all files from"
            " the same checkpoint."
        )
    if ranks is not None:
        ranks.join()
        model = load_rank(checkpoint, config, ranks, dtype, revision)
    else:
        if weights is not None:
            options["quantization_config"] = quantiser_for(weights, config, dtype, keep)
        model = GLM4VForConditionalGeneration.from_pretrained(
            checkpoint, revision=revision, dtype=dtype, **options
        )
    set_decoding(model, decoding)
    return model.eval(), processor


def _check_parallel(parallel: str, device_map, max_memory, decoding: str, weights: str | None):
    if parallel != "tensor":
        raise ValueError(f"parallel is {parallel!r}; expected 'tensor', or None for one process.")
    if device_map is not None or max_memory is not None:
        raise ValueError(
            "parallel is 'tensor', and there is a device_map or max_memory. Expected one of the"
            " two: every rank has its part of each layer on its card. Leave the map out."
        )
    if weights is not None:
        raise ValueError(
            f"parallel is 'tensor' and weights {weights!r}; expected one of the two, as a part of a"
            " quantised weight is not cut here. Leave one out."
        )
    if decoding == "compiled":
        raise ValueError(
            "parallel is 'tensor' and decoding 'compiled'; expected another, as what the ranks"
            " exchange is not compiled here. Take 'fast', or leave decoding out."
        )
