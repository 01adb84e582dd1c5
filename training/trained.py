"""A trained model as a folder and as something to ask.

    model.safetensors   weights
    config.json         shape, token ranges, and how it was trained
    vocab.txt           text vocabulary

This is what a registry holds and what every task loads. It needs torch, safetensors, tokenizers and numpy, and of our
code only `training`, so it travels with the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from training.model import ModelConfig, VideoBERT
from training.packing import Document, collate, sequence
from training.text import MASK, TextVocabulary, TokenLayout

MODEL_FILES = ("model.safetensors", "config.json", "vocab.txt")


class Query(NamedTuple):
    """A text, [MASK]s in it or not, and the visual tokens that go with it, perhaps none."""

    text: str
    visual_tokens: np.ndarray


class Answer(NamedTuple):
    """What the model says to a query."""

    log_probabilities: np.ndarray  # [num_masks, num_text] float32
    alignment: float  # probability that text and visual tokens belong together; NaN where one is missing


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """Weights with their vocabulary."""

    model: VideoBERT
    vocabulary: TextVocabulary
    training: dict[str, Any]  # settings and identifiers of the run

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.model.state_dict(), folder / "model.safetensors")
        config = {
            "model": asdict(self.model.config),
            "layout": asdict(self.model.layout),
            "training": self.training,
        }
        (folder / "config.json").write_text(json.dumps(config, sort_keys=True, indent=1) + "\n", encoding="utf-8")
        self.vocabulary.save(folder / "vocab.txt")

    @classmethod
    def load(cls, folder: Path) -> TrainedModel:
        """Raises FileNotFoundError if the folder is not a model."""
        if missing := [name for name in MODEL_FILES if not (folder / name).is_file()]:
            raise FileNotFoundError(f"{folder} is no trained model, it lacks {', '.join(missing)}; give one that is.")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model = VideoBERT(ModelConfig(**config["model"]), TokenLayout(**config["layout"]))
        model.load_state_dict(load_file(folder / "model.safetensors"))
        vocabulary = TextVocabulary.load(folder / "vocab.txt")
        return cls(model=model.eval(), vocabulary=vocabulary, training=config["training"])

    def ask(self, queries: Sequence[Query], *, batch: int = 64) -> Iterator[Answer]:
        """An answer for each query, in order. Raises ValueError for a query the model cannot take."""
        for first in range(0, len(queries), batch):
            yield from self._ask(queries[first : first + batch])

    @torch.inference_mode()
    def _ask(self, queries: Sequence[Query]) -> list[Answer]:
        documents = [self._document(query) for query in queries]
        pack = collate(documents)
        x_TD = self.model.encode(pack)
        masked = pack.token_T == self.vocabulary.ids[MASK]
        logits_KW = self.model.text_logits(x_TD, pack, masked.nonzero().flatten())
        per_query = [int((document.tokens == self.vocabulary.ids[MASK]).sum()) for document in documents]
        rows = torch.log_softmax(logits_KW.float(), dim=-1).split_with_sizes(per_query)
        alignment_S = torch.sigmoid(self.model.alignment_logits(x_TD, pack.first_S).float())
        joint = [bool(len(query.visual_tokens)) and bool(query.text.strip()) for query in queries]
        return [
            Answer(row.numpy(), float(alignment_S[index]) if joint[index] else float("nan"))
            for index, row in enumerate(rows)
        ]

    def _document(self, query: Query) -> Document:
        layout, visual = self.model.layout, np.asarray(query.visual_tokens, np.int64)
        if len(visual) and not (visual.min() >= 0 and visual.max() < layout.num_visual):
            raise ValueError(
                f"visual tokens must lie in [0, {layout.num_visual}), not {visual.min()}..{visual.max()}; "
                "use tokens of the vocabulary that the model was trained with."
            )
        tokens, types = sequence(self.vocabulary.encode(query.text), visual, layout=layout, vocabulary=self.vocabulary)
        if len(tokens) > self.model.config.max_positions:
            raise ValueError(
                f"a sequence of {len(tokens)} tokens is longer than the model's {self.model.config.max_positions}; "
                "give a shorter text or fewer visual tokens."
            )
        return Document(tokens=tokens, types=types)
