"""Queries as ranking takes them: texts in the prompts of a mode, or embeddings made before."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32

from data_pipelines import prompts
from owl_det.errors import ConfigError, DataError
from owl_det.inference import ranking, text_queries
from owl_det.inference.text_encoder import EmbedPrompts, TextEncoder
from owl_det.types import LoadedModel

QUERY_BUCKET = 16  # numbers of queries are rounded up to a multiple: fewer compilations
TEXTS_KEPT = 2**28  # bytes of texts' embeddings that are remembered: 256 MiB


class EncodedQueries(NamedTuple):
    """The queries of one call."""

    embeddings: Float32[np.ndarray, "t q e"]
    names: tuple[str, ...]
    is_asked: Bool[np.ndarray, " q"]  # False: the same text stands before

    def padded(
        self, multiple: int = QUERY_BUCKET
    ) -> tuple[Float32[np.ndarray, "t p e"], Bool[np.ndarray, " p"]]:
        """Embeddings and `is_asked` with fillers, up to a multiple of so many queries."""
        filler = -len(self.names) % multiple
        embeddings = np.pad(self.embeddings, ((0, 0), (0, filler), (0, 0)))
        return embeddings, np.pad(self.is_asked, (0, filler))


class QueryEncoder:
    """Encodes texts with the text tower of one model; remembers the last ones."""

    def __init__(self, model: LoadedModel, embed_prompts: EmbedPrompts) -> None:
        """Raises `DataError` if the model's tokeniser cannot be used."""
        self._model = model
        self._encoder = TextEncoder(
            embed_prompts, model.config, model.tokenizer, multiple=QUERY_BUCKET
        )
        self._texts: OrderedDict[tuple[tuple[str, ...], str], np.ndarray] = OrderedDict()

    def prompt_mode(self, mode: str | None) -> str:
        """The mode, by default the model's. Raises `DataError` for one that does not exist."""
        if mode is None or mode == "":
            return self._model.eval_prompts
        try:
            prompts.eval_prompts(mode)
        except (ConfigError, TypeError):
            raise DataError(
                f"prompt_mode: {mode!r} is not one of 'none', 'clip' and 'clip_best7'"
            ) from None
        return mode

    def encode(self, queries: str | Sequence[str], mode: str) -> EncodedQueries:
        """Raises `DataError` for texts of no use, `CheckpointError` if the model computes NaN."""
        texts = text_queries.texts(queries)
        return EncodedQueries(self._embed(texts, mode), texts, text_queries.is_asked(texts))

    def forget(self) -> None:
        """Empties the memory."""
        self._texts.clear()

    def _embed(self, texts: tuple[str, ...], mode: str) -> Float32[np.ndarray, "t q e"]:
        """Embeddings of texts, from memory if they were asked lately."""
        key = texts, mode
        if key not in self._texts:
            text_queries.check_read(texts, self._encoder.tokenizer)
            text_queries.warn(texts)
            self._encoder.warn_of_cut(texts, mode)
            computed = self._encoder.embed(self._model.params, texts, mode)
            computed = np.asarray(computed, np.float32)
            ranking.require_finite("queries", computed)
            self._texts[key] = computed
        self._texts.move_to_end(key)
        found = self._texts[key]
        while sum(x.nbytes for x in self._texts.values()) > TEXTS_KEPT:
            self._texts.popitem(last=False)
        return found
