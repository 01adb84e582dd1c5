from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from training.model import ModelConfig, VideoBERT
from training.packing import Document, Pack, Targets, collate, sequence
from training.text import TokenLayout, build_vocabulary

VOCABULARY = build_vocabulary(["chop the onion", "stir the soup"], max_size=100)
LAYOUT = TokenLayout(num_text=len(VOCABULARY), num_visual=12)
CONFIG = ModelConfig(num_layers=2, hidden=16, num_heads=2, intermediate=32, max_positions=32)


def model(**changes: object) -> VideoBERT:
    torch.manual_seed(0)
    return VideoBERT(dataclasses.replace(CONFIG, **changes), LAYOUT).eval()


def document(sentence: str, clips: list[int], **targets: object) -> Document:
    tokens, types = sequence(
        VOCABULARY.encode(sentence), np.array(clips, np.int64), layout=LAYOUT, vocabulary=VOCABULARY
    )
    return Document(tokens=tokens, types=types, **targets)  # type: ignore[arg-type]


def encoded(network: VideoBERT, *documents: Document) -> list[torch.Tensor]:
    """Context of each document."""
    pack: Pack = collate(documents)
    return list(network.encode(pack).split([len(d.tokens) for d in documents]))


def test_document_cannot_see_its_neighbour() -> None:
    network, mine = model(), document("chop the onion", [1, 2, 3])
    beside = encoded(network, mine, document("stir the soup", [4, 5, 6]))[0]
    beside_other = encoded(network, mine, document("chop the soup", [7, 8, 9]))[0]
    assert torch.equal(beside, beside_other)


def test_document_reads_the_same_alone_and_between_longer_ones() -> None:
    network, mine = model(), document("chop the onion", [1, 2, 3])
    long = document("stir the soup stir the soup", [4, 5, 6, 7, 8, 9])
    torch.testing.assert_close(encoded(network, mine)[0], encoded(network, long, mine, long)[1])


def test_every_token_of_a_document_sees_every_other() -> None:
    network = model()
    before = encoded(network, document("chop the onion", [1, 2, 3]))[0]
    after = encoded(network, document("chop the onion", [1, 2, 4]))[0]
    assert ((before - after).abs().amax(dim=1) > 0).all()


def test_predictions_are_over_the_own_modality_at_masked_places_only() -> None:
    mine = document(
        "chop the onion",
        [1, 2, 3],
        text=Targets(np.array([1, 3]), np.array([7, 8])),
        visual=Targets(np.array([5]), np.array([1])),
        aligned=0,
    )
    predictions = model()(collate([mine]))
    assert predictions.text_KW.shape == (2, LAYOUT.num_text)
    assert predictions.visual_MV.shape == (1, LAYOUT.num_visual)
    assert predictions.alignment_A.shape == (1,)


@pytest.mark.parametrize("fusion", ["residual", "concat"])
def test_concatenated_output_reads_the_input_embedding(fusion: str) -> None:
    """At a masked place the word underneath reaches the output through attention or, with concat, also directly."""
    network = model(output_fusion=fusion)
    assert network.head.dense.in_features == (16 if fusion == "residual" else 32)
    pack = collate([document("chop the onion", [1], text=Targets(np.array([1]), np.array([7])))])
    loss = network(pack).text_KW.sum()
    loss.backward()
    assert network.head.dense.weight.grad is not None


def test_frozen_input_embeddings_get_no_gradient_but_the_rest_does() -> None:
    network = model(freeze_input_embeddings=True)
    network(collate([document("chop", [1], text=Targets(np.array([1]), np.array([7])))])).text_KW.sum().backward()
    assert network.embeddings.tokens.weight.grad is None
    assert network.embeddings.positions.weight.grad is not None
    assert network.head.bias.grad is not None


def test_output_weights_are_the_embedding_table() -> None:
    names = dict(model().named_parameters())
    assert sum(parameter.shape == (LAYOUT.size, 16) for parameter in names.values()) == 1


def test_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.hidden 10"):
        ModelConfig(hidden=10, num_heads=3)
