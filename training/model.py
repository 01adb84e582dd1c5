"""VideoBERT: BERT over wordpieces and visual tokens in one sequence (paper section 3.2).

BERT's architecture to the letter (post-norm, GELU, learned positions, token types, tied output weights), so its
weights load as they are; the embedding table has a row for `[>]` and for each visual token. Two things differ from
common BERT code: only masked positions reach the output layer (15 % of the positions: at a 51,258-way softmax of a
4-layer model that is two thirds of all work saved), and a masked position is scored against its own modality, which
its token type tells anyway: a softmax over both would spend 20,737 more logits on learning never to be wrong about
it.

Shape suffixes: T tokens of a pack, D width, S documents, K masked words, M masked visual tokens, A aligned-or-not
documents, W text vocabulary, V visual vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.attention import DocumentGrid, SelfAttention
from training.packing import Pack
from training.text import TokenLayout

CentroidInit = Literal["raw", "rescale_to_text_norm"]
OutputFusion = Literal["residual", "concat"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of the network."""

    num_layers: int = 12
    """Transformer layers."""
    hidden: int = 768
    """Width."""
    num_heads: int = 12
    """Attention heads of a layer."""
    intermediate: int = 3072
    """Width of the feed-forward layer."""
    max_positions: int = 512
    """Longest sequence in tokens."""
    dropout: float = 0.1
    """Of embeddings, attention and sublayers."""
    layer_norm_eps: float = 1e-12
    """BERT's epsilon."""
    init_std: float = 0.02
    """Of all weights that nothing is loaded into."""
    output_fusion: OutputFusion = "residual"
    """How a masked position reaches the output: its context alone, or concatenated with its input embedding."""
    centroid_init: CentroidInit = "rescale_to_text_norm"
    """Visual rows as the centroids are, or brought to the mean norm of the text rows by one factor."""
    freeze_input_embeddings: bool = False
    """Keep the embedding rows of words and visual tokens as they start (paper section 4.2)."""

    def __post_init__(self) -> None:
        if self.hidden % self.num_heads:
            raise ValueError(f"model.hidden {self.hidden} must be a multiple of model.num_heads {self.num_heads}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout {self.dropout} must lie in [0, 1); BERT's is 0.1.")


class Predictions(NamedTuple):
    """Logits at the places that have a target."""

    text_KW: Tensor
    visual_MV: Tensor
    alignment_A: Tensor


class VideoBERT(nn.Module):
    """The network. `forward` gives logits; `encode` the contextual embeddings."""

    def __init__(self, config: ModelConfig, layout: TokenLayout) -> None:
        super().__init__()
        self.config, self.layout = config, layout
        self.embeddings = Embeddings(config, layout)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.head = Head(config, layout)
        self.alignment = nn.Linear(config.hidden, 1)
        self.apply(self._initialise)
        if config.freeze_input_embeddings:
            self.embeddings.tokens.weight.requires_grad_(False)

    def encode(self, pack: Pack) -> Tensor:
        """[T, D]: every token in the context of its document."""
        x_TD = self.embeddings(pack)
        for layer in self.layers:
            x_TD = layer(x_TD, pack.grid)
        return x_TD

    def forward(self, pack: Pack) -> Predictions:
        """Logits of masked words, masked visual tokens, and alignment of the documents that have it as a target."""
        x_TD = self.encode(pack)
        return Predictions(
            text_KW=self.text_logits(x_TD, pack, pack.text_index_K),
            visual_MV=self.visual_logits(x_TD, pack, pack.visual_index_M),
            alignment_A=self.alignment_logits(x_TD, pack.alignment_index_A),
        )

    def text_logits(self, x_TD: Tensor, pack: Pack, index_K: Tensor) -> Tensor:
        """[K, W]: at some tokens, over the text vocabulary."""
        return self._logits(x_TD, pack, index_K, slice(0, self.layout.num_text))

    def visual_logits(self, x_TD: Tensor, pack: Pack, index_M: Tensor) -> Tensor:
        """[M, V]: at some tokens, over the visual tokens."""
        return self._logits(x_TD, pack, index_M, slice(self.layout.first_visual, self.layout.size))

    def alignment_logits(self, x_TD: Tensor, index_A: Tensor) -> Tensor:
        """[A]: the log-odds that text and visual tokens of a sequence belong together, read at its [CLS]."""
        return self.alignment(x_TD[index_A]).squeeze(-1)

    def _logits(self, x_TD: Tensor, pack: Pack, index_K: Tensor, rows: slice) -> Tensor:
        table = self.embeddings.tokens.weight
        input_KD = table[pack.token_T[index_K]] if self.config.output_fusion == "concat" else None
        hidden_KD = self.head(x_TD[index_K], input_KD)
        return F.linear(hidden_KD, table[rows], self.head.bias[rows])

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.init_std)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


class Embeddings(nn.Module):
    """Token + position + type, normalised."""

    def __init__(self, config: ModelConfig, layout: TokenLayout) -> None:
        super().__init__()
        self.tokens = nn.Embedding(layout.size, config.hidden)
        self.positions = nn.Embedding(config.max_positions, config.hidden)
        self.types = nn.Embedding(2, config.hidden)
        self.norm = nn.LayerNorm(config.hidden, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, pack: Pack) -> Tensor:
        """[T, D]."""
        x_TD = self.tokens(pack.token_T) + self.positions(pack.position_T) + self.types(pack.type_T)
        return self.dropout(self.norm(x_TD))


class Layer(nn.Module):
    """A transformer layer with the norms behind the sums, as in BERT."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(hidden=config.hidden, num_heads=config.num_heads, dropout=config.dropout)
        self.attention_norm = nn.LayerNorm(config.hidden, eps=config.layer_norm_eps)
        self.expand = nn.Linear(config.hidden, config.intermediate)
        self.contract = nn.Linear(config.intermediate, config.hidden)
        self.output_norm = nn.LayerNorm(config.hidden, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_TD: Tensor, grid: DocumentGrid) -> Tensor:
        """[T, D] -> [T, D]."""
        x_TD = self.attention_norm(x_TD + self.dropout(self.attention(x_TD, grid)))
        return self.output_norm(x_TD + self.dropout(self.contract(F.gelu(self.expand(x_TD)))))


class Head(nn.Module):
    """BERT's prediction transform; its output is multiplied with the embedding table."""

    def __init__(self, config: ModelConfig, layout: TokenLayout) -> None:
        super().__init__()
        width = 2 * config.hidden if config.output_fusion == "concat" else config.hidden
        self.dense = nn.Linear(width, config.hidden)
        self.norm = nn.LayerNorm(config.hidden, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(layout.size))

    def forward(self, x_KD: Tensor, input_KD: Tensor | None) -> Tensor:
        """[K, D] -> [K, D]; `input_KD` joins where the fusion is `concat`."""
        joined = x_KD if input_KD is None else torch.cat([x_KD, input_KD], dim=-1)
        return self.norm(F.gelu(self.dense(joined)))
