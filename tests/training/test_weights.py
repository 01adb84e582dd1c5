from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from training.model import ModelConfig, VideoBERT
from training.packing import Document, Targets, collate
from training.text import TokenLayout
from training.weights import bert_config, fit_width, load_bert, set_visual_rows

NUM_TEXT, HIDDEN, HEADS, INNER, LAYERS, POSITIONS = 40, 16, 4, 24, 2, 20
LAYOUT = TokenLayout(num_text=NUM_TEXT, num_visual=9)


def write_bert(folder: Path, *, old_names: bool = False) -> dict[str, Tensor]:
    """A random BERT in Hugging Face's key layout."""
    torch.manual_seed(3)
    state: dict[str, Tensor] = {}

    def add(name: str, *shape: int) -> None:
        state[name] = torch.randn(*shape) * 0.3

    add("bert.embeddings.word_embeddings.weight", NUM_TEXT, HIDDEN)
    add("bert.embeddings.position_embeddings.weight", POSITIONS, HIDDEN)
    add("bert.embeddings.token_type_embeddings.weight", 2, HIDDEN)
    for layer in range(LAYERS):
        at = f"bert.encoder.layer.{layer}"
        for part in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            add(f"{at}.{part}.weight", HIDDEN, HIDDEN)
            add(f"{at}.{part}.bias", HIDDEN)
        add(f"{at}.intermediate.dense.weight", INNER, HIDDEN)
        add(f"{at}.intermediate.dense.bias", INNER)
        add(f"{at}.output.dense.weight", HIDDEN, INNER)
        add(f"{at}.output.dense.bias", HIDDEN)
    add("cls.predictions.transform.dense.weight", HIDDEN, HIDDEN)
    add("cls.predictions.transform.dense.bias", HIDDEN)
    add("cls.predictions.bias", NUM_TEXT)
    norms = ["bert.embeddings", "cls.predictions.transform"]
    norms += [f"bert.encoder.layer.{i}.{part}" for i in range(LAYERS) for part in ("attention.output", "output")]
    for at in norms:
        for kind, old in (("weight", "gamma"), ("bias", "beta")):
            add(f"{at}.LayerNorm.{old if old_names else kind}", HIDDEN)
    save_file(state, folder / "model.safetensors")
    shape = {
        "num_hidden_layers": LAYERS,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "intermediate_size": INNER,
        "max_position_embeddings": POSITIONS,
        "layer_norm_eps": 1e-12,
    }
    (folder / "config.json").write_text(json.dumps(shape))
    return {name.replace("gamma", "weight").replace("beta", "bias"): value for name, value in state.items()}


def reference_logits(state: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """BERT's masked-word logits by torch's own encoder layer: [T] -> [T, NUM_TEXT]."""

    def affine(name: str) -> tuple[Tensor, Tensor]:
        return state[f"{name}.weight"], state[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        return nn.functional.layer_norm(x, (HIDDEN,), *affine(name), eps=1e-12)

    table = state["bert.embeddings.word_embeddings.weight"]
    x = table[tokens] + state["bert.embeddings.position_embeddings.weight"][: len(tokens)]
    x = norm(x + state["bert.embeddings.token_type_embeddings.weight"][0], "bert.embeddings.LayerNorm")[None]
    for layer in range(LAYERS):
        at = f"bert.encoder.layer.{layer}"
        module = nn.TransformerEncoderLayer(
            HIDDEN, HEADS, INNER, dropout=0.0, activation="gelu", layer_norm_eps=1e-12, batch_first=True
        )
        parts = [f"{at}.attention.self.{part}" for part in ("query", "key", "value")]
        sources = {
            "self_attn.out_proj": f"{at}.attention.output.dense",
            "linear1": f"{at}.intermediate.dense",
            "linear2": f"{at}.output.dense",
            "norm1": f"{at}.attention.output.LayerNorm",
            "norm2": f"{at}.output.LayerNorm",
        }
        loaded = {
            f"{ours}.{kind}": state[f"{name}.{kind}"] for ours, name in sources.items() for kind in ("weight", "bias")
        }
        loaded["self_attn.in_proj_weight"] = torch.cat([state[f"{part}.weight"] for part in parts])
        loaded["self_attn.in_proj_bias"] = torch.cat([state[f"{part}.bias"] for part in parts])
        module.load_state_dict(loaded)
        x = module.train()(x)
    hidden = nn.functional.gelu(nn.functional.linear(x[0], *affine("cls.predictions.transform.dense")))
    hidden = norm(hidden, "cls.predictions.transform.LayerNorm")
    return hidden @ table.T + state["cls.predictions.bias"]


@pytest.mark.parametrize("old_names", [False, True])
@pytest.mark.parametrize("fusion", ["residual", "concat"])
def test_forward_equals_bert_with_its_weights(tmp_path: Path, old_names: bool, fusion: str) -> None:
    state = write_bert(tmp_path, old_names=old_names)
    config = dataclasses.replace(bert_config(tmp_path, ModelConfig()), output_fusion=fusion)
    network = VideoBERT(config, LAYOUT).eval()
    load_bert(network, tmp_path)
    tokens = torch.tensor([2, 11, 4, 17, 38, 3])
    document = Document(
        tokens=tokens.numpy(), types=np.zeros(6, np.int64), text=Targets(np.arange(6), np.zeros(6, np.int64))
    )
    ours = network(collate([document, document])).text_KW
    torch.testing.assert_close(ours[:6], reference_logits(state, tokens), atol=1e-5, rtol=1e-5)


def test_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    write_bert(tmp_path)
    config = dataclasses.replace(bert_config(tmp_path, ModelConfig()), intermediate=INNER + 4)
    with pytest.raises(ValueError, match=r"shape.*config\.json"):
        load_bert(VideoBERT(config, LAYOUT), tmp_path)


def small_model(**changes: object) -> VideoBERT:
    config = ModelConfig(num_layers=1, hidden=HIDDEN, num_heads=HEADS, intermediate=INNER, **changes)  # type: ignore[arg-type]
    return VideoBERT(config, LAYOUT)


def test_visual_rows_are_the_centroids_where_widths_are_equal() -> None:
    centroids = np.random.default_rng(0).normal(size=(9, HIDDEN)).astype(np.float32)
    network = small_model(centroid_init="raw")
    set_visual_rows(network, centroids)
    rows = network.embeddings.tokens.weight.detach().numpy()[LAYOUT.first_visual :]
    np.testing.assert_array_equal(rows, centroids)


def test_rescaled_rows_have_the_mean_norm_of_the_text_rows() -> None:
    network = small_model()
    norms = set_visual_rows(network, 50 + np.random.default_rng(0).normal(size=(9, 32)).astype(np.float32))
    assert norms.visual == pytest.approx(norms.text, rel=1e-5)
    assert norms.centroids > 100


def test_projection_keeps_distances_where_there_is_room() -> None:
    centroids = np.random.default_rng(0).normal(size=(9, 32)).astype(np.float32)
    rows = fit_width(centroids, HIDDEN)

    def distances(points: np.ndarray) -> np.ndarray:
        return np.linalg.norm(points[:, None] - points[None], axis=-1)

    np.testing.assert_allclose(distances(rows), distances(centroids), atol=1e-4)


def test_another_number_of_centroids_is_refused() -> None:
    with pytest.raises(ValueError, match=r"8 centroids and dataset\.json says 9"):
        set_visual_rows(small_model(), np.ones((8, HIDDEN), np.float32))
