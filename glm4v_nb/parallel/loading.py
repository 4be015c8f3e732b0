"""Every rank reads its part of the tensors out of the files, and no more of them."""

from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import GenerationConfig
from transformers.utils import logging

from glm4v_nb.model import GLM4VConfig, GLM4VForConditionalGeneration
from glm4v_nb.model.checkpoint import check_weights, weight_files
from glm4v_nb.model.checkpoint_files import SMALL_FILES, local_directory
from glm4v_nb.parallel.modeling import GLM4VRank, rank_class
from glm4v_nb.parallel.plan import cut
from glm4v_nb.parallel.ranks import Ranks


class Part:
    """A tensor in a file as transformers' loader takes it: read when it is indexed, a part only.

    Rows that lie together are a view of the mapped file, others are copied out of it.
    """

    def __init__(self, tensor, where: tuple[int, list[tuple[int, int]]] | None):
        self.tensor, self.where = tensor, where

    def __getitem__(self, _) -> torch.Tensor:
        if self.where is None:
            return self.tensor[...]
        dimension, ranges = self.where
        before = (slice(None),) * dimension
        pieces = [self.tensor[(*before, slice(*one))] for one in ranges]
        return torch.cat(pieces, dimension) if len(pieces) > 1 else pieces[0].contiguous()


def load_rank(
    checkpoint: str | Path,
    config: GLM4VConfig,
    ranks: Ranks,
    dtype: torch.dtype | str,
    revision: str | None = None,
) -> GLM4VRank:
    """The part of a checkpoint's model that is this rank's, on its device.

    Raises:
        FileNotFoundError, ValueError: as ``load_checked``; a quantised checkpoint.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{checkpoint} is quantised. Expected plain weights, whose rows and columns can be"
            " taken apart. Load it without parallel."
        )
    files = (*SMALL_FILES, "*.safetensors")
    directory = Path(local_directory(checkpoint, files, revision=revision))
    check_weights(directory, GLM4VForConditionalGeneration, config)
    dtype = config.dtype or torch.float32 if dtype == "auto" else dtype
    with ExitStack() as stack:
        if ranks.rank and logging.is_progress_bar_enabled():  # the first has one
            logging.disable_progress_bar()
            stack.callback(logging.enable_progress_bar)
        parts = {}
        for shard in sorted(weight_files(directory)):
            file = stack.enter_context(safe_open(directory / shard, framework="pt"))
            for name in file.keys():
                tensor = file.get_slice(name)
                where = cut(name, tensor.get_shape(), config, ranks.rank, ranks.count)
                parts[name] = Part(tensor, where)
        model = rank_class(ranks).from_pretrained(
            None, config=config, state_dict=parts, dtype=dtype, device_map={"": ranks.device}
        )
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    model.name_or_path = model.config.name_or_path = str(checkpoint)
    return model.eval().requires_grad_(False)
