"""Texts as vectors whose directions say how alike they are.

"tfidf" needs no download: word counts weighted by rarity (TF-IDF), reduced by a truncated SVD (latent semantic
analysis, Deerwester et al. 1990). Any other name is a model of the sentence-transformers library, an extra.

An embedder is fitted, and what it was fitted on can be read out of it: a TF-IDF vocabulary is a list of its documents'
words. Where something computed with it is released, fit it on synthetic or public texts only.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dptune._validate import present, refuse, require_count

if TYPE_CHECKING:  # programs import this module before they parse their flags: scikit-learn is loaded when it is used
    from sklearn.decomposition import TruncatedSVD

TFIDF = "tfidf"
_FLAG = "--embedder"
_BATCH_SIZE, _LONG = 32, 1000  # of a neural model; texts beyond which it shows how far it is


class Embedder(Protocol):
    """Turns texts into vectors of length 1; alike texts have a large inner product."""

    def fit(self, texts: Sequence[str]) -> None:
        """Learn from `texts` whatever there is to learn, once, before `embed`."""

    def embed(self, texts: Sequence[str], *, alone: bool = False) -> np.ndarray:
        """float32 [N, D], a row a text. Rows have length 1, or 0 where nothing in the text is known.

        Args:
            texts: N.
            alone: to the last bit, a row follows from its own text. Ask for it where texts are private: in a batch a
                neural model pads them to the longest, which moves the last bits of the others' vectors, and so one
                text may decide whose nearest neighbour another's is. Slower.
        """


def make_embedder(name: str = TFIDF, *, dimensions: int = 64, seed: int = 0) -> Embedder:
    """An embedder, not fitted yet.

    Args:
        name: "tfidf", or a folder or hub name of a sentence-transformers model.
        dimensions: of "tfidf"'s vectors, at most; fewer where few words or texts are fitted.
        seed: of the SVD's random start.

    Raises:
        InvalidArgument: dimensions below 1, or a model where sentence-transformers is not installed or cannot load it.
    """
    require_count("dimensions", dimensions)
    return _Tfidf(dimensions, seed) if name == TFIDF else _SentenceTransformer(name)


class _Tfidf:
    """TF-IDF over words, then the leading singular directions of what was fitted."""

    def __init__(self, dimensions: int, seed: int) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        self._dimensions, self._seed = dimensions, seed
        # Sublinear counts: a word said ten times is not ten times as telling. One-letter words count too.
        self._words = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
        self._directions: TruncatedSVD | None = None

    def fit(self, texts: Sequence[str]) -> None:
        from sklearn.decomposition import TruncatedSVD

        try:
            counts = self._words.fit_transform(texts)
        except ValueError:  # scikit-learn's empty vocabulary
            refuse(_FLAG, TFIDF, f"none of the {len(texts)} texts to fit has a word in it; give others")
        rank = min(self._dimensions, *counts.shape)
        self._directions = TruncatedSVD(rank, random_state=self._seed).fit(counts)

    def embed(self, texts: Sequence[str], *, alone: bool = False) -> np.ndarray:  # noqa: ARG002  # it always is
        from sklearn.preprocessing import normalize

        reduced = present(self._directions, "fit before embed").transform(self._words.transform(texts))
        return normalize(reduced).astype(np.float32)


class _SentenceTransformer:
    """A pretrained encoder; learns nothing here."""

    def __init__(self, name: str) -> None:
        if find_spec("sentence_transformers") is None:
            refuse(_FLAG, name, f"needs `pip install sentence-transformers`; {TFIDF} needs nothing")
        from sentence_transformers import SentenceTransformer

        try:
            self._model = SentenceTransformer(name)
        except (OSError, ValueError) as error:
            refuse(_FLAG, name, f"cannot be loaded as a sentence-transformers model ({type(error).__name__})")

    def fit(self, texts: Sequence[str]) -> None:
        """Nothing to learn."""

    def embed(self, texts: Sequence[str], *, alone: bool = False) -> np.ndarray:
        size = 1 if alone else _BATCH_SIZE
        vectors = self._model.encode(
            list(texts), batch_size=size, normalize_embeddings=True, show_progress_bar=len(texts) > _LONG
        )
        return np.asarray(vectors, dtype=np.float32)
