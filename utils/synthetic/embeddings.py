"""Embeddings of texts.

"tfidf" needs no download: word counts weighted by rarity (TF-IDF), reduced by a truncated SVD (latent semantic
analysis, Deerwester et al. 1990). Any other name is a model of the sentence-transformers library, an extra.

An embedder reveals the texts that it was fitted on: a TF-IDF vocabulary lists their words. If something computed with
it is released, fit it only on synthetic or public texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dptune._validate import present, refuse, require_count

if TYPE_CHECKING:  # programs import this module to parse their flags, so scikit-learn is imported only when used
    from sklearn.decomposition import TruncatedSVD

TFIDF = "tfidf"
_FLAG = "--embedder"
_BATCH_SIZE, _LONG = 32, 1000  # of a neural model; number of texts from which a progress bar is shown


class Embedder(Protocol):
    """Turns texts into vectors of length 1; similar texts have a large inner product."""

    def fit(self, texts: Sequence[str]) -> None:
        """Fit to `texts`; called once before `embed`."""

    def embed(self, texts: Sequence[str], *, alone: bool = False) -> np.ndarray:
        """Embeddings, float32 [N, D], one row per text. Rows have length 1, or 0 if no word of the text is known.

        Args:
            texts: N texts.
            alone: embed each text alone, so that its row depends on no other text, to the last bit. Use it for private
                texts: in a batch, padding to the longest text changes the last bits of other rows, so one text could
                change the nearest neighbour of another. Slower.
        """


def make_embedder(name: str = TFIDF, *, dimensions: int = 64, seed: int = 0) -> Embedder:
    """An embedder, not fitted yet.

    Args:
        name: "tfidf", or a folder or hub name of a sentence-transformers model.
        dimensions: maximum dimensions of "tfidf"; fewer if it is fitted to few words or texts.
        seed: seed of the SVD.

    Raises:
        InvalidArgument: dimensions below 1, sentence-transformers is not installed, or it cannot load the model.
    """
    require_count("dimensions", dimensions)
    return _Tfidf(dimensions, seed) if name == TFIDF else _SentenceTransformer(name)


class _Tfidf:
    """TF-IDF over words, then the leading singular directions of what was fitted."""

    def __init__(self, dimensions: int, seed: int) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        self._dimensions, self._seed = dimensions, seed
        # Sublinear counts: a word used ten times is not ten times as important. One-letter words count too.
        self._words = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
        self._directions: TruncatedSVD | None = None

    def fit(self, texts: Sequence[str]) -> None:
        from sklearn.decomposition import TruncatedSVD

        try:
            counts = self._words.fit_transform(texts)
        except ValueError:  # scikit-learn's empty vocabulary
            refuse(_FLAG, TFIDF, f"none of the {len(texts)} texts to fit has a word in it; give other texts")
        rank = min(self._dimensions, *counts.shape)
        self._directions = TruncatedSVD(rank, random_state=self._seed).fit(counts)

    def embed(self, texts: Sequence[str], *, alone: bool = False) -> np.ndarray:  # noqa: ARG002  # always alone
        from sklearn.preprocessing import normalize

        reduced = present(self._directions, "fit before embed").transform(self._words.transform(texts))
        return normalize(reduced).astype(np.float32)


class _SentenceTransformer:
    """A pretrained encoder; it is not fitted."""

    def __init__(self, name: str) -> None:
        if find_spec("sentence_transformers") is None:
            refuse(_FLAG, name, f"needs `pip install sentence-transformers`; {TFIDF} needs nothing")
        from sentence_transformers import SentenceTransformer

        try:
            self._model = SentenceTransformer(name)
        except (OSError, ValueError) as error:
            refuse(_FLAG, name, f"cannot be loaded as a sentence-transformers model ({type(error).__name__})")

    def fit(self, texts: Sequence[str]) -> None:
        """Do nothing."""

    def embed(self, texts: Sequence[str], *, alone: bool = False) -> np.ndarray:
        size = 1 if alone else _BATCH_SIZE
        vectors = self._model.encode(
            list(texts), batch_size=size, normalize_embeddings=True, show_progress_bar=len(texts) > _LONG
        )
        return np.asarray(vectors, dtype=np.float32)
