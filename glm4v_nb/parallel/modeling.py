"""One rank's model: the model of a smaller configuration, and sums over the ranks between."""

from itertools import chain
from operator import itemgetter

import torch
from torch import nn
from torch.nn import functional

from glm4v_nb.model import GLM4VConfig, GLM4VForConditionalGeneration
from glm4v_nb.model.official_names import register_official_layout
from glm4v_nb.parallel.plan import share_of, style_of
from glm4v_nb.parallel.ranks import Ranks
from glm4v_nb.parallel.telling import told


class RowSum(nn.Linear):
    """A product of this rank's columns, added up over the ranks; the bias is added once, after."""

    def __init__(self, ranks: Ranks, *sizes: int, bias: bool):
        super().__init__(*sizes, bias=bias)
        self.ranks = ranks

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        product = functional.linear(features, self.weight)
        if product.requires_grad:
            raise RuntimeError(
                "The ranks of a model exchange no gradients here. Expected inference. Call it under"
                " torch.no_grad(), or load it with a device_map to train."
            )
        total = self.ranks.add_up(product)
        return total if self.bias is None else total.add_(self.bias)


class VocabularyEmbedding(nn.Embedding):
    """The rows of this rank's tokens, zeros for others, added up: one of the ranks has each."""

    def __init__(self, ranks: Ranks, tokens: int, features: int):
        super().__init__(tokens // ranks.count, features)
        self.ranks, self.first = ranks, ranks.rank * (tokens // ranks.count)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        own = ids - self.first
        others = (own < 0) | (own >= self.num_embeddings)
        rows = functional.embedding(own.masked_fill(others, 0), self.weight)
        return self.ranks.add_up(rows.masked_fill(others[..., None], 0))


class VocabularyHead(nn.Linear):
    """Logits of this rank's tokens, then those of all."""

    def __init__(self, ranks: Ranks, features: int, tokens: int):
        super().__init__(features, tokens // ranks.count, bias=False)
        self.ranks = ranks

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.ranks.join_features(super().forward(features))


class GLM4VRank(GLM4VForConditionalGeneration):
    """The part of one rank; the same inputs on every rank give the same logits on every rank.

    Made of the configuration of the whole model by a class of ``rank_class``, whose ``ranks`` say
    which part. Its ``config`` is that of the part.
    """

    ranks: Ranks

    def __init__(self, config: GLM4VConfig):
        ranks = self.ranks
        super().__init__(share_of(config, ranks.count))
        features = config.vision_config.hidden_size
        for layer in self.vision_tower.layers:
            # The number of its heads is no width of the configuration: it has their size from it.
            layer.attention.query_key_value = nn.Linear(features, 3 * features // ranks.count)
            layer.attention.dense = nn.Linear(features // ranks.count, features)
        for name, module in list(self.named_modules()):
            if style_of(name) == "rowwise":
                sizes, bias = (module.in_features, module.out_features), module.bias is not None
                self.set_submodule(name, RowSum(ranks, *sizes, bias=bias))
        sizes = config.padded_vocab_size, config.hidden_size
        self.language_model.embed_tokens = VocabularyEmbedding(ranks, *sizes)
        self.lm_head = VocabularyHead(ranks, *sizes[::-1])

    def generate(self, inputs=None, generation_config=None, **kwargs):
        """As of the whole model, and all ranks choose the same tokens, drawn ones too.

        Raises:
            ValueError: the ranks are asked different things, or to end at a time, which comes for
                each at another token.
        """
        with told(self.ranks):
            self._agree(inputs, generation_config or self.generation_config, kwargs)
            return super().generate(inputs, generation_config, **kwargs)

    def _agree(self, inputs, config, given: dict):
        """Compare what the ranks are asked, and let them draw alike; raises as ``generate``."""
        if given.get("max_time", config.max_time) is not None:
            raise ValueError(
                "max_time is given, but the ranks of a model would end at different tokens."
                " Expected a length. Give max_new_tokens."
            )
        # Streamers, criteria and the like are objects of each rank's own.
        plain = (torch.Tensor, bool, int, float, str, list, dict, type(None))
        public = [item for item in vars(config).items() if not item[0].startswith("_")]
        asked = [("inputs", inputs), *public, *given.items()]
        asked = [item for item in asked if type(item[1]) in plain]
        self.ranks.agree(chain(*sorted(asked, key=itemgetter(0))))
        if given.get("do_sample", config.do_sample):
            self.ranks.draw_alike()

    def load_adapter(self, *args, **kwargs):
        raise ValueError(
            "This is one rank's part of a model, and an adapter is of the whole one. Load that"
            " without parallel, merge the adapter into it, save it, and load what was saved."
        )

    add_adapter = load_adapter

    def save_pretrained(self, *args, **kwargs):
        raise ValueError(
            "This is one rank's part of a model. Expected the whole one to save. Load it without"
            " parallel."
        )

    def resize_token_embeddings(self, *args, **kwargs):
        raise ValueError(
            "This is one rank's part of a model. Expected the whole one to resize. Load it without"
            " parallel, resize, save, and load that."
        )


register_official_layout(GLM4VRank.__name__)


def rank_class(ranks: Ranks) -> type[GLM4VRank]:
    """The class whose models are the part of this rank."""
    return type(GLM4VRank.__name__, (GLM4VRank,), {"ranks": ranks, "__doc__": GLM4VRank.__doc__})
