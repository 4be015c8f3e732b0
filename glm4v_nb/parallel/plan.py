"""What is split over the ranks, and how: every rank has a share of the heads and of the widths.

The words are those of transformers' ``tp_plan``, but its machinery does not load this model. Read
in transformers 5.17 and 5.23:

- ``core_model_loading.convert_and_load_state_dict_in_model`` cuts what it reads by the first tensor
  that becomes of it. Queries, keys and values are one tensor in the official files, of which rank 0
  would get the first rows: half of the queries, and no keys.
- ``ColwiseParallel`` cuts 256 rows of keys into four times 64, which is half a head; four ranks
  need each of the two heads of keys twice.
- The plan of ``GlmConfig`` gathers gate and up on every rank, because ``GlmMLP`` halves them.
- The parameters become DTensors, which Triton kernels do not take.

So the files are cut here (``cut``), the model is made of a smaller configuration (``share_of``),
and transformers' loader brings the one into the other as ever.
"""

import re
from copy import deepcopy

from glm4v_nb.model.configuration import GLM4VConfig
from glm4v_nb.model.official_names import names_here

_LAYER, _TOWER = "language_model.layers.*.", "vision_tower.layers.*."
# "colwise" has rows of the weight (features that come out), "packed_colwise" of each of the parts
# that are one below the other in it, "rowwise" columns (features that go in), whose products are
# added up. The rest is whole on every rank: norms, the tower's embedding and convolution, and the
# first product of the projector.
PLAN = {
    "language_model.embed_tokens": "embedding_rowwise",
    **{f"{_LAYER}self_attn.{part}_proj": "colwise" for part in "qkv"},
    f"{_LAYER}self_attn.o_proj": "rowwise",
    f"{_LAYER}mlp.gate_up_proj": "packed_colwise",
    f"{_LAYER}mlp.down_proj": "rowwise",
    "lm_head": "colwise_gather_output",
    f"{_TOWER}attention.query_key_value": "packed_colwise",
    f"{_TOWER}attention.dense": "rowwise",
    f"{_TOWER}mlp.fc1": "colwise",
    f"{_TOWER}mlp.fc2": "rowwise",
    "vision_tower.linear_proj.gate_proj": "colwise",
    "vision_tower.linear_proj.dense_h_to_4h": "colwise",
    "vision_tower.linear_proj.dense_4h_to_h": "rowwise",
}
_PACKED = {"gate_up_proj": 2, "query_key_value": 3}


def style_of(module: str) -> str | None:
    """How a module of this name is split; None for what every rank has whole."""
    return PLAN.get(re.sub(r"\.\d+\.", ".*.", module))


def check_count(config: GLM4VConfig, count: int):
    """Raise ValueError where so many ranks cannot share the model, with the reason and what can."""
    if reason := _why_not(config, count):
        right = [str(number) for number in range(1, 65) if not _why_not(config, number)]
        raise ValueError(
            f"{count} ranks cannot share this model: {reason}. Expected a number that leaves every"
            f" rank whole heads and equal widths. Take one of {', '.join(right)}."
        )


def _why_not(config: GLM4VConfig, count: int) -> str | None:
    vision, groups = config.vision_config, config.multi_query_group_num
    for size, what in (
        (config.num_attention_heads, "heads of the decoder's attention"),
        (vision.num_heads, "heads of the tower's attention"),
        (config.ffn_hidden_size, "features in the decoder's MLP"),
        (vision.intermediate_size, "features in the tower's MLP"),
        (config.padded_vocab_size, "tokens of the vocabulary"),
    ):
        if size % count:
            return f"its {size:,} {what} are not divisible by {count}"
    if groups % count and count % groups:
        return f"its {groups} heads of keys go neither whole nor repeated into {count}"
    return None


def share_of(config: GLM4VConfig, count: int) -> GLM4VConfig:
    """The configuration of one rank's model: its heads and widths. More ranks than heads of keys
    have one each, which others have as well."""
    share = deepcopy(config)
    share.num_attention_heads //= count
    share.multi_query_group_num = max(1, config.multi_query_group_num // count)
    share.ffn_hidden_size //= count
    share.vision_config.intermediate_size //= count
    return share


def cut(name: str, shape: list[int], config: GLM4VConfig, rank: int, count: int):
    """Where in a checkpoint's tensor a rank's part is.

    Args:
        name: an official name, or that of a tensor here.
        config: of the whole model.

    Returns:
        the dimension, and the (start, stop) along it that one after the other make the part; None
        for a tensor that every rank has whole.
    """
    here, found, start = names_here(name), [], 0
    group_rows = config.multi_query_group_num * config.kv_channels
    rows = [shape[0]]
    if len(here) == 3:  # queries, keys and values, which are one tensor
        rows = [shape[0] - 2 * group_rows, group_rows, group_rows]
    for part, size in zip(here, rows, strict=True):
        module, _, kind = part.rpartition(".")
        leaf, style = module.rpartition(".")[2], style_of(module)
        if style is None or (style == "rowwise" and kind == "bias"):
            return None
        if style == "rowwise":
            return 1, [_share(0, shape[1], rank, count)]
        groups = config.multi_query_group_num if leaf in ("k_proj", "v_proj") else None
        packed = _PACKED[leaf] if style == "packed_colwise" else 1
        for _ in range(packed):
            found.append(_share(start, size // packed, rank, count, groups))
            start += size // packed
    return 0, found


def _share(start: int, size: int, rank: int, count: int, units: int | None = None):
    """The (start, stop) of a rank's share; of so many units, one at least."""
    units = units or count
    first, each = rank * units // count, size // units
    return start + first * each, start + (first + max(1, units // count)) * each
