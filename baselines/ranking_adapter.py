"""The ranking-aware adapter: tokens of a frozen encoder attend to learned ones; a score, and a comparison of pairs."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, smooth_l1_loss

from baselines.attention import Attention, num_heads, split_heads
from baselines.linear import FullPrecisionLinear, FullPrecisionNorm
from ordinalclip.heads import Factor, Head, HeadContext, Outputs, Prediction, Reads, Targets, Width
from ordinalclip.losses import at_least_float32, weighted_mean

Count = Annotated[int, Field(ge=1, le=1024)]
BLOCKS = 2  # that look at the text tokens, and as many that do not


def pairwise_ranking_loss(logits: Tensor, values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Cross-entropy of whether y_i > y_j, over all ordered pairs of a batch, those of equal labels and i = j included.

    Args:
        logits: (B, B), of "i is above j"; for scores s_i, s_i - s_j.
        values: (B,) labels, in a unit in which equal labels are equal numbers.
        weights: (B,) or None; a pair counts w_i w_j, so that a sample of weight w counts as w copies.

    Returns:
        a scalar.
    """
    logits = at_least_float32(logits)
    above = (values[:, None] > values).to(logits.dtype)
    losses = binary_cross_entropy_with_logits(logits, above, reduction="none")
    return weighted_mean(losses.flatten(), None if weights is None else (weights[:, None] * weights).flatten())


def log_smooth_l1(scores: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """log(1 + e), e the mean of e_i^2 / 2 where an error e_i = |s_i - y_i| is below 1 and of e_i - 1/2 beyond.

    Args:
        scores, labels: (B,), in the same unit, which decides what 1 is.
        weights: (B,) or None; a sample of weight w counts as w copies.

    Returns:
        a scalar.
    """
    return weighted_mean(smooth_l1_loss(at_least_float32(scores), labels, reduction="none"), weights).log1p()


class Block(nn.Module):
    """Tokens (B, N, W) attend to each other, then a hidden layer as wide as they; both residual, after a norm.

    Args:
        width: W.
        dropout: of what the two add.
    """

    def __init__(self, width: int, dropout: float = 0.0):
        super().__init__()
        self.norm, self.attention = FullPrecisionNorm(width), Attention(width)
        self.layers = nn.Sequential(
            FullPrecisionNorm(width), FullPrecisionLinear(width, width), nn.GELU(), FullPrecisionLinear(width, width)
        )
        self.dropouts = nn.ModuleList(nn.Dropout(dropout) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.norm(tokens)
        tokens = tokens + self.dropouts[0](self.attention(normed, normed))
        return tokens + self.dropouts[1](self.layers(tokens))


class Comparator(nn.Module):
    """Of two images, which is above: queries attend to the tokens of both at once.

    A softmax over the tokens of two images is one over those of each, times the share of attention that each image
    gets, a sigmoid of the difference of their log-sum-exps. So `read` looks at every image once, for itself, and
    `forward` needs no tensor with both pairs and tokens:

        weights of i's tokens in the pair (i, j) = softmax over i * sigmoid(mass_i - mass_j)

    Args:
        width: W of the tokens.
        num_queries: Q.
    """

    def __init__(self, width: int, num_queries: int):
        super().__init__()
        self.heads = num_heads(width)
        self.queries = nn.Parameter(torch.randn(num_queries, width) * width**-0.5)
        self.query = nn.Sequential(FullPrecisionLinear(width, width), FullPrecisionNorm(width))
        self.key_and_value = nn.Sequential(FullPrecisionLinear(width, width), FullPrecisionNorm(width))
        self.merge = FullPrecisionLinear(width, width)
        self.layers = nn.Sequential(FullPrecisionNorm(width), *_hidden_layers(width, 3), FullPrecisionLinear(width, 1))

    def read(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, W) tokens -> what the queries find in each image, (B, H, Q, W / H), and its mass, (B, H, Q)."""
        query = split_heads(self.query(at_least_float32(self.queries)), self.heads)
        found = split_heads(self.key_and_value(tokens), self.heads)
        scores = query @ found.transpose(-1, -2) / query.shape[-1] ** 0.5
        return scores.softmax(dim=-1) @ found, scores.logsumexp(dim=-1)

    def forward(self, found: Tensor, mass: Tensor) -> Tensor:
        """What `read` gives of all images -> (B, B) logits of "i is above j"."""
        share = torch.sigmoid(mass[:, None] - mass)
        of_first = torch.einsum("ijhq,ihqe->ijhe", share, found).flatten(2)  # the queries summed, before the layer
        return self.layers(self.merge(of_first - of_first.transpose(0, 1))).squeeze(-1)


class RankingAdapter(Head):
    """Tokens of the image attend to learned text tokens; a score for each image, and a comparison of every pair.

    Paper: Yu et al., "Ranking-aware adapter for text-driven image ordering with CLIP", ICLR 2025, arXiv:2412.06760.

    The encoder stays as it is with model.features=cached, as published. The answer is the score, of standardised
    labels; the comparison, `pairwise_ranking_loss`, shapes what it is read from. Two things differ from the authors'
    model. Theirs has the frozen tokens of a caption and learned ones beside them; here a model answers one question,
    so that the caption would never change, and all text tokens are learned. And tokens of an image are brought to one
    width first. Norms come before their layers, which the paper's text does not say.

    Args:
        width: of all tokens within the adapter.
        num_text_tokens: number of learned text tokens.
        num_queries: of the comparison.
        dropout: of what the layers of the last two blocks add.
        regression_weight: factor of log(1 + smooth L1) of the score, beside the comparison's 1.
    """

    reads: ClassVar[Reads] = "tokens"

    def __init__(
        self,
        context: HeadContext,
        width: Width = 128,
        num_text_tokens: Count = 32,
        num_queries: Count = 16,
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1,
        regression_weight: Factor = 0.2,
    ):
        super().__init__(context)
        self.regression_weight = regression_weight
        self.project = nn.Sequential(
            FullPrecisionNorm(context.input_dim), FullPrecisionLinear(context.input_dim, width)
        )
        self.text_tokens = nn.Parameter(torch.randn(num_text_tokens, width) * num_text_tokens**-0.5)
        self.blocks = nn.ModuleList(Block(width) for _ in range(BLOCKS))
        self.norms = nn.ModuleList(FullPrecisionNorm(width) for _ in range(BLOCKS))
        self.attentions = nn.ModuleList(Attention(width) for _ in range(BLOCKS))
        self.encoder = nn.Sequential(*(Block(width, dropout) for _ in range(BLOCKS)))
        self.norm = FullPrecisionNorm(width)
        self.regression = nn.Sequential(*_hidden_layers(width, 2), FullPrecisionLinear(width, 1))
        self.comparator = Comparator(width, num_queries)
        for head in (self.regression, self.comparator):
            for layer in head.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.xavier_normal_(layer.weight)
                    nn.init.zeros_(layer.bias)

    def tokens(self, features: Tensor) -> Tensor:
        """(B, N, D) tokens of the images -> (B, N, W), after all attention."""
        tokens, text = self.project(features), at_least_float32(self.text_tokens)[None]
        for block, norm, attention in zip(self.blocks, self.norms, self.attentions, strict=True):
            tokens = block(tokens)
            tokens = tokens + attention(norm(tokens), text)
        return self.encoder(tokens)

    def space(self, features: Tensor) -> Tensor:
        """The sum over the tokens (B, W), from which the score is read."""
        return self.norm(self.tokens(features)).sum(dim=1)

    def forward(self, features: Tensor) -> Outputs:
        with torch.autocast(features.device.type, enabled=False):
            tokens = self.tokens(features)
            found, mass = self.comparator.read(tokens)
            standardised = self.regression(self.norm(tokens).sum(dim=1)).squeeze(-1)
            return {"standardised": standardised, "found": found, "mass": mass}

    def loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        values, weights = targets.values, targets.weights
        ranking = pairwise_ranking_loss(self.comparator(outputs["found"], outputs["mass"]), values, weights)
        regression = log_smooth_l1(outputs["standardised"], self.standardise(values), weights)
        return {"loss": ranking + self.regression_weight * regression, "ranking": ranking, "regression": regression}

    def predict(self, outputs: Outputs) -> Prediction:
        return self.predict_value(outputs["standardised"])


def _hidden_layers(width: int, count: int) -> list[nn.Module]:
    layers = [(FullPrecisionLinear(width, width), FullPrecisionNorm(width), nn.ReLU()) for _ in range(count)]
    return [part for layer in layers for part in layer]
