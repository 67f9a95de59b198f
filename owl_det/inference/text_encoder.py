"""Embeddings of names in prompts, for all who ask a model by text.

A name is put into every template, the texts become token ids, and the text tower runs on tables of
t prompts × q names. Tables have few shapes, so that the tower is compiled a few times only.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from absl import logging
from jaxtyping import Array, Bool, Float, Float32, Int32

from data_pipelines import prompts, tokenizer
from owl_det.config import ModelConfig
from owl_det.types import Params

NAMES_AT_ONCE = 256  # names that pass through the text tower together, in up to seven prompts
_PROMPTS_AT_ONCE = 7

# (parameters, token ids [t q l]) → embeddings; compiled by whoever makes the encoder.
EmbedPrompts: TypeAlias = Callable[[Params, Any], Float[Array | np.ndarray, "t q e"]]


class TextEncoder:
    """A tokeniser and a text tower.

    A table holds all names, their number rounded up to `multiple`. More than `names_at_once` names
    are split into tables of that many; with more than seven prompts into smaller ones. Fillers are
    rows of zeros and are cut off again.
    """

    def __init__(
        self,
        embed_prompts: EmbedPrompts,
        model: ModelConfig,
        tokenizer_file: str = "",
        *,
        names_at_once: int = NAMES_AT_ONCE,
        multiple: int = 1,
    ) -> None:
        """Raises `DataError` if the tokeniser's file cannot be used (`tokenizer.build`)."""
        self.tokenizer = tokenizer.build(model.text, tokenizer_file)
        self._embed_prompts, self._embedding_dim = embed_prompts, model.embedding_dim
        self._names_at_once, self._multiple = names_at_once, multiple

    def embed(
        self, params: Params, names: Sequence[str], prompt_mode: str
    ) -> Float[np.ndarray, "t q e"]:
        """Embeddings of each name in each prompt of the mode, as the model computes them.

        Raises `ConfigError` if `prompts.eval_prompts` has no such mode.
        """
        ids = [self.tokenizer.encode_all(row) for row in _prompted(names, prompt_mode)]
        return self._embed_ids(params, np.stack(ids))

    def embed_texts(self, params: Params, texts: Sequence[str]) -> Float[np.ndarray, "q e"]:
        """Embeddings of whole texts such as captions, without a prompt."""
        return self._embed_ids(params, self.tokenizer.encode_all(list(texts))[None])[0]

    def is_cut(self, names: Sequence[str], prompt_mode: str) -> Bool[np.ndarray, "t q"]:
        """Which prompted names are longer than the text tower takes and lose their last words."""
        rows = _prompted(names, prompt_mode)
        cut = [[not self.tokenizer.fits(text) for text in row] for row in rows]
        return np.array(cut, bool).reshape(len(rows), len(names))

    def warn_of_cut(self, names: Sequence[str], prompt_mode: str) -> None:
        """Logs a warning for each text that `is_cut`."""
        rows, length = _prompted(names, prompt_mode), self.tokenizer.num_positions
        for t, q in np.argwhere(self.is_cut(names, prompt_mode)):
            logging.warning("Query %r is cut: it is longer than %d tokens", rows[t][q], length)

    def _embed_ids(
        self, params: Params, ids: Int32[np.ndarray, "t q l"]
    ) -> Float[np.ndarray, "t q e"]:
        num_prompts, num_names = ids.shape[:2]
        if not num_names:
            return np.zeros((num_prompts, 0, self._embedding_dim), np.float32)
        width = self._table_width(num_prompts, num_names)
        parts: list[np.ndarray] = []
        for start in range(0, num_names, width):
            part = ids[:, start : start + width]
            filler = width - part.shape[1]
            table = np.pad(part, ((0, 0), (0, filler), (0, 0)))
            parts.append(np.asarray(self._embed_prompts(params, table))[:, : part.shape[1]])
        return np.concatenate(parts, axis=1)

    def _table_width(self, num_prompts: int, num_names: int) -> int:
        most = self._names_at_once
        if num_prompts > _PROMPTS_AT_ONCE:  # "clip" has 80
            most = max(self._multiple, _PROMPTS_AT_ONCE * most // num_prompts)
        return most if num_names > most else -(-num_names // self._multiple) * self._multiple


def mean_of_prompts(embeddings: Float[np.ndarray, "t q e"]) -> Float32[np.ndarray, "q e"]:
    """Mean of the unit-length embeddings of each name in its t prompts, of unit length again."""
    unit = embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True)
    mean = unit.astype(np.float32).mean(axis=0)
    return mean / np.linalg.norm(mean, axis=-1, keepdims=True)


def _prompted(names: Sequence[str], prompt_mode: str) -> list[list[str]]:
    """The names in each template, one row a template."""
    templates = prompts.eval_prompts(prompt_mode)
    return [[prompts.apply_template(t, name) for name in names] for t in templates]
