"""Where a model's first weights come from: BERT's for everything textual, the centroids for the visual rows.

The paper starts from BERT-large because its width is that of S3D's features, 1024 (section 4.2). At another width the
centroids are projected onto their principal components: of all linear maps to that width it keeps most of the
distances between centroids, and it takes out their mean, which all post-ReLU features share and which would otherwise
drown the differences behind the layer norm. A random orthogonal projection would keep a share hidden/feature_dim of
the squared distances.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from training.model import CentroidInit, ModelConfig, VideoBERT
from training.text import TextVocabulary


class RowNorms(NamedTuple):
    """Mean length of embedding rows: it decides how sharp the tied output starts."""

    text: float
    centroids: float
    visual: float


def set_visual_rows(model: VideoBERT, centroids: np.ndarray) -> RowNorms:
    """Start the rows of the visual tokens from [num_visual, feature_dim] centroids; returns the norms before and after.

    Raises ValueError if there is not one centroid for each visual token.
    """
    layout = model.layout
    if len(centroids) != layout.num_visual:
        raise ValueError(
            f"the vocabulary has {len(centroids)} centroids and dataset.json says {layout.num_visual} visual tokens; "
            "restore the vocabulary that dataset.json names."
        )
    table = model.embeddings.tokens.weight
    text_norm = _mean_norm(table[: layout.num_text].detach().numpy())
    rows = fit_width(centroids, model.config.hidden)
    rows = scale_rows(rows, init=model.config.centroid_init, text_norm=text_norm)
    with torch.no_grad():
        table[layout.first_visual : layout.size] = torch.from_numpy(rows)
    return RowNorms(text=text_norm, centroids=_mean_norm(centroids), visual=_mean_norm(rows))


def fit_width(centroids: np.ndarray, hidden: int) -> np.ndarray:
    """[V, feature_dim] -> [V, hidden] float32: as they are at equal width, else their principal components.

    Where there are fewer components than `hidden`, zeros fill the rest.
    """
    centroids = np.asarray(centroids, np.float32)
    if centroids.shape[1] == hidden:
        return centroids
    centered = centroids - centroids.mean(axis=0)
    left, singular, _ = np.linalg.svd(centered.astype(np.float64), full_matrices=False)
    components = (left * singular)[:, :hidden]
    # The sign of a component is the solver's whim: make its largest entry positive.
    flip = np.sign(components[np.abs(components).argmax(axis=0), np.arange(components.shape[1])])
    rows = np.zeros((len(centroids), hidden), np.float32)
    rows[:, : components.shape[1]] = components * np.where(flip == 0, 1, flip)
    return rows


def scale_rows(rows: np.ndarray, *, init: CentroidInit, text_norm: float) -> np.ndarray:
    """The rows as they are, or times the one factor that gives them the mean norm of the text rows."""
    norm = _mean_norm(rows)
    return rows if init == "raw" or norm == 0 else rows * np.float32(text_norm / norm)


def bert_config(folder: Path, config: ModelConfig) -> ModelConfig:
    """The config with the shape of the BERT in a local folder."""
    shape = json.loads(_file(folder, "config.json").read_text(encoding="utf-8"))
    return replace(
        config,
        num_layers=shape["num_hidden_layers"],
        hidden=shape["hidden_size"],
        num_heads=shape["num_attention_heads"],
        intermediate=shape["intermediate_size"],
        max_positions=shape["max_position_embeddings"],
        layer_norm_eps=shape.get("layer_norm_eps", 1e-12),
    )


def bert_vocabulary(folder: Path) -> TextVocabulary:
    return TextVocabulary.load(folder / "vocab.txt")


def load_bert(model: VideoBERT, folder: Path) -> None:
    """Load the weights of a Hugging Face BERT from a local folder with config.json and model.safetensors.

    The rows of `[>]` and of the visual tokens, and the alignment layer, stay as they are. With `output_fusion:
    concat` the half of the output layer that reads the context is BERT's and the other half starts at zero, so it
    starts as BERT too.

    Raises FileNotFoundError where a file is missing and ValueError where shapes differ or a weight is missing.
    """
    found = _without_prefix(load_file(_file(folder, "model.safetensors")))
    num_text, state = model.layout.num_text, model.state_dict()
    with torch.no_grad():
        for name, sources in _bert_names(model.config.num_layers).items():
            if missing := [source for source in sources if source not in found]:
                raise ValueError(f"{folder} lacks {missing}; give the folder of a BertForPreTraining model.")
            value = torch.cat([found[source].float() for source in sources])
            target = state[name]
            if name in ("embeddings.tokens.weight", "head.bias"):
                target = target[:num_text]
            if name == "head.dense.weight" and model.config.output_fusion == "concat":
                target[:, model.config.hidden :] = 0
                target = target[:, : model.config.hidden]
            if target.shape != value.shape:
                raise ValueError(
                    f"{sources[0]} of {folder} has shape {tuple(value.shape)} and this model needs "
                    f"{tuple(target.shape)}; use the shape in that folder's config.json."
                )
            target.copy_(value)


def _bert_names(num_layers: int) -> dict[str, list[str]]:
    """Our parameter names to those of Hugging Face; several are concatenated."""
    names = {
        "embeddings.tokens.weight": ["embeddings.word_embeddings.weight"],
        "embeddings.positions.weight": ["embeddings.position_embeddings.weight"],
        "embeddings.types.weight": ["embeddings.token_type_embeddings.weight"],
        "head.bias": ["cls.predictions.bias"],
    }
    modules = {
        "embeddings.norm": ["embeddings.LayerNorm"],
        "head.dense": ["cls.predictions.transform.dense"],
        "head.norm": ["cls.predictions.transform.LayerNorm"],
    }
    for layer in range(num_layers):
        ours, theirs = f"layers.{layer}", f"encoder.layer.{layer}"
        modules |= {
            f"{ours}.attention.qkv": [f"{theirs}.attention.self.{part}" for part in ("query", "key", "value")],
            f"{ours}.attention.out": [f"{theirs}.attention.output.dense"],
            f"{ours}.attention_norm": [f"{theirs}.attention.output.LayerNorm"],
            f"{ours}.expand": [f"{theirs}.intermediate.dense"],
            f"{ours}.contract": [f"{theirs}.output.dense"],
            f"{ours}.output_norm": [f"{theirs}.output.LayerNorm"],
        }
    for ours, sources in modules.items():
        for kind in ("weight", "bias"):
            names[f"{ours}.{kind}"] = [f"{source}.{kind}" for source in sources]
    return names


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face names without `bert.`, and with weight and bias where older files say gamma and beta."""
    renamed = {}
    for name, value in state.items():
        name = name.removeprefix("bert.")
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        renamed[name] = value
    return renamed


def _file(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"no {name} in {folder}; give the folder of a BERT with safetensors weights.")
    return path


def _mean_norm(rows: np.ndarray) -> float:
    return float(np.linalg.norm(rows, axis=1).mean()) if len(rows) else 0.0
