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

# So many bytes of columns are brought together at a time: memory that is asked for in small amounts
# is used again, where a large amount is new each time, and the system clears it page by page.
AT_A_TIME = 2**21


class Part:
    """A tensor in a file as transformers' loader takes it: read when it is indexed, a part only.

    Rows that lie together are a view of the mapped file, which the loader sends to the device;
    others are put together there, and are nowhere else.
    """

    def __init__(self, tensor, where: tuple[int, list[tuple[int, int]]] | None, device):
        self.tensor, self.where, self.device = tensor, where, device

    def __getitem__(self, _) -> torch.Tensor:
        if self.where is None:
            return self.tensor[...]
        dimension, ranges = self.where
        before = (slice(None),) * dimension
        pieces = [self.tensor[(*before, slice(*one))] for one in ranges]
        if len(pieces) == 1 and not dimension:
            return pieces[0]
        sizes = [piece.shape[dimension] for piece in pieces]
        shape = list(pieces[0].shape)
        shape[dimension] = sum(sizes)
        whole = torch.empty(shape, dtype=pieces[0].dtype, device=self.device)
        for place, piece in zip(whole.split(sizes, dimension), pieces, strict=True):
            rows = max(1, AT_A_TIME // piece[0].nbytes) if dimension else len(piece)
            for there, here in zip(place.split(rows), piece.split(rows), strict=True):
                there.copy_(here)
        return whole


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
                parts[name] = Part(tensor, where, ranks.device)
        model = rank_class(ranks).from_pretrained(
            None, config=config, state_dict=parts, dtype=dtype, device_map={"": ranks.device}
        )
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    model.name_or_path = model.config.name_or_path = str(checkpoint)
    return model.eval().requires_grad_(False)
