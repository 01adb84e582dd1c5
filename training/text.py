"""Text to token ids and back: BERT's WordPiece, and the one place that says which id means what.

    [0, num_text)                text vocabulary, special tokens among it (BERT's own ids where it comes from BERT)
    num_text                     [>], the token between a sentence and its visual tokens (paper section 3.2)
    [num_text + 1, size)         visual tokens

Where no BERT vocabulary is given, one is made from the corpus: special tokens, characters, then whole words by
frequency. We do not use the trainer of `tokenizers`: four runs over the same 2,000 sentences gave four different
vocabularies (hash order breaks its ties), and a vocabulary that changes between runs makes checkpoints of the same
command strangers. The price is that a word too rare for the vocabulary is spelled by letters and not by syllables.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import WordPiece as WordPieceDecoder
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

PAD, UNKNOWN, CLS, SEP, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
SPECIAL_TOKENS = (PAD, UNKNOWN, CLS, SEP, MASK)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLayout:
    """The ranges of token ids. The size of the embedding table is `size`."""

    num_text: int
    num_visual: int

    @property
    def joint(self) -> int:
        """The id of `[>]`."""
        return self.num_text

    @property
    def first_visual(self) -> int:
        return self.num_text + 1

    @property
    def size(self) -> int:
        return self.num_text + 1 + self.num_visual


class TextVocabulary:
    """A WordPiece vocabulary with its tokenizer: lowercase, accents stripped, as BERT's uncased models have it."""

    def __init__(self, tokens: Sequence[str]) -> None:
        """Raises ValueError if a special token is missing or a token comes twice."""
        self.tokens = tuple(tokens)
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        if missing := [token for token in SPECIAL_TOKENS if token not in self.ids]:
            raise ValueError(f"the text vocabulary lacks {missing}; use the vocab.txt of a BERT model.")
        if len(self.ids) != len(self.tokens):
            raise ValueError("the text vocabulary holds a token twice; use the vocab.txt of a BERT model as it is.")
        self._tokenizer = Tokenizer(WordPiece(self.ids, unk_token=UNKNOWN))
        self._tokenizer.normalizer = BertNormalizer(lowercase=True)
        self._tokenizer.pre_tokenizer = BertPreTokenizer()
        self._tokenizer.decoder = WordPieceDecoder()

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def ordinary_ids(self) -> np.ndarray:
        """The ids that a random replacement may draw: everything but special and unused tokens."""
        special = [token.startswith("[") and token.endswith("]") and len(token) > 2 for token in self.tokens]
        return np.flatnonzero(~np.array(special)).astype(np.int64)

    @property
    def digest(self) -> str:
        return hashlib.sha256("\n".join(self.tokens).encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """[num_wordpieces] int64, without [CLS] and [SEP]. `[MASK]` in the text becomes the mask token."""
        parts = text.split(MASK)
        pieces = [self.ids[MASK] if part is None else part for part in _interleave(parts)]
        ids: list[int] = []
        for piece in pieces:
            if isinstance(piece, int):
                ids.append(piece)
            else:
                ids.extend(self._tokenizer.encode(piece, add_special_tokens=False).ids)
        return np.array(ids, np.int64)

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The wordpieces of each text; text that holds no [MASK]."""
        return [np.array(e.ids, np.int64) for e in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False))

    def save(self, path: Path) -> None:
        path.write_bytes(self.to_text().encode())

    @classmethod
    def load(cls, path: Path) -> TextVocabulary:
        """Raises FileNotFoundError where there is no vocab.txt."""
        if not path.is_file():
            raise FileNotFoundError(f"no vocabulary at {path}: give a folder that holds BERT's vocab.txt.")
        return cls.from_text(path.read_bytes().decode())

    def to_text(self) -> str:
        """The content of vocab.txt: a token a line."""
        return "".join(f"{token}\n" for token in self.tokens)

    @classmethod
    def from_text(cls, content: str) -> TextVocabulary:
        # Not splitlines: BERT's own vocabulary has tokens that it would take for line ends.
        return cls(content.removesuffix("\n").replace("\r\n", "\n").split("\n"))


def build_vocabulary(sentences: Iterable[str], *, max_size: int) -> TextVocabulary:
    """Special tokens, the characters of the corpus, then its words by frequency (ties by spelling) up to `max_size`."""
    normalizer, pre_tokenizer = BertNormalizer(lowercase=True), BertPreTokenizer()
    counts: Counter[str] = Counter()
    for sentence in sentences:
        counts.update(word for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(sentence)))
    characters = sorted({character for word in counts for character in word})
    spelled = characters + [f"##{character}" for character in characters]
    by_frequency = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))
    room = max(0, max_size - len(SPECIAL_TOKENS) - len(spelled))
    return TextVocabulary([*SPECIAL_TOKENS, *spelled, *by_frequency[:room]])


def _interleave(parts: Sequence[str]) -> list[str | None]:
    """The parts of a split text with None where the separator was."""
    joined: list[str | None] = [parts[0]]
    for part in parts[1:]:
        joined += [None, part]
    return joined
