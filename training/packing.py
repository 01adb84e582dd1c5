"""Documents to one pack of tensors, without padding.

A document is one training sequence, `[CLS] sentence [>] visual tokens [SEP]` (paper section 3.2), with the targets of
its masked positions. A pack concatenates documents; no tensor has a padded row outside attention
(`training.attention`), which at 50 % padding halves the work of every matrix product.

Shape suffixes: T tokens of a pack, S documents, L longest document, K masked words, M masked visual tokens,
A documents that count for alignment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from training.attention import DocumentGrid, document_grid
from training.text import CLS, SEP, TextVocabulary, TokenLayout

TEXT_TYPE, VISUAL_TYPE = 0, 1


class Targets(NamedTuple):
    """Masked positions of a sequence and what stood there."""

    positions: np.ndarray  # int64
    ids: np.ndarray  # int64; visual ones counted from 0


NO_TARGETS = Targets(np.empty(0, np.int64), np.empty(0, np.int64))


class Document(NamedTuple):
    """One sequence. Positions of targets count from its [CLS]."""

    tokens: np.ndarray  # int64 [length]
    types: np.ndarray  # int64 [length]: 0 text, 1 visual
    text: Targets = NO_TARGETS
    visual: Targets = NO_TARGETS
    aligned: int = -1  # 1 or 0 where alignment is a target, else -1


class Pack(NamedTuple):
    """What the model reads in one forward pass."""

    token_T: Tensor
    type_T: Tensor
    position_T: Tensor
    grid: DocumentGrid
    first_S: Tensor  # where each document's [CLS] is
    text_index_K: Tensor
    text_target_K: Tensor
    visual_index_M: Tensor
    visual_target_M: Tensor
    alignment_index_A: Tensor
    aligned_A: Tensor  # float32, 0 or 1

    def to(self, device: torch.device | str) -> Pack:
        moved = {name: value.to(device) for name, value in self._asdict().items() if name != "grid"}
        return Pack(**moved, grid=DocumentGrid(*(tensor.to(device) for tensor in self.grid)))


def sequence(
    text: np.ndarray, visual: np.ndarray, *, layout: TokenLayout, vocabulary: TextVocabulary
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and types of `[CLS] text [>] visual [SEP]`; without one side, without `[>]`.

    Args:
        text: [num_wordpieces] ids.
        visual: [num_clips] visual tokens, counted from 0.
    """
    cls, sep = vocabulary.ids[CLS], vocabulary.ids[SEP]
    joint = [layout.joint] if len(text) and len(visual) else []
    first = np.concatenate([[cls], text, joint]).astype(np.int64)
    second = np.concatenate([visual + layout.first_visual, [sep]]).astype(np.int64)
    types = np.full(len(first) + len(second), TEXT_TYPE, np.int64)
    if len(visual):
        types[len(first) :] = VISUAL_TYPE
    return np.concatenate([first, second]), types


def visual_offset(num_text: int) -> int:
    """Where the first visual token of a sequence with so many wordpieces stands: after [CLS], text and [>]."""
    return 1 + num_text + int(num_text > 0)


def sequence_length(num_text: int, num_visual: int) -> int:
    """Tokens of the sequence that `sequence` makes: [CLS], [SEP] and, between two sides, [>]."""
    return num_text + num_visual + 2 + int(num_text > 0 and num_visual > 0)


def collate(documents: Sequence[Document]) -> Pack:
    """One pack of documents, in their order. Raises ValueError if there are none."""
    if not documents:
        raise ValueError("a pack needs at least one document.")
    lengths = [len(document.tokens) for document in documents]
    starts = np.cumsum([0, *lengths[:-1]])
    aligned = np.array([document.aligned for document in documents])
    return Pack(
        token_T=_join([document.tokens for document in documents]),
        type_T=_join([document.types for document in documents]),
        position_T=_join([np.arange(length) for length in lengths]),
        grid=document_grid(lengths),
        first_S=torch.from_numpy(starts),
        text_index_K=_join([d.text.positions + s for d, s in zip(documents, starts, strict=True)]),
        text_target_K=_join([document.text.ids for document in documents]),
        visual_index_M=_join([d.visual.positions + s for d, s in zip(documents, starts, strict=True)]),
        visual_target_M=_join([document.visual.ids for document in documents]),
        alignment_index_A=torch.from_numpy(starts[aligned >= 0]),
        aligned_A=torch.from_numpy(aligned[aligned >= 0].astype(np.float32)),
    )


def _join(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
