"""The vocabulary of a tokeniser in the file that came with a model's weights."""

from pathlib import Path
from typing import Any

from owl_det import files
from owl_det.errors import DataError
from owl_det.optional import installation


def read_json(file: Path, vocabulary_size: int) -> Any:
    """The tokeniser of a `tokenizer.json`, as the library `tokenizers` has it.

    Raises `DataError` if the library is missing, the file cannot be read, or it has more entries
    than `vocabulary_size`, which is the text tower's.
    """
    try:
        import tokenizers  # pyright: ignore[reportMissingImports]  # extra siglip
    except ModuleNotFoundError:
        raise _missing("tokenizers", file) from None
    try:
        library: Any = tokenizers.Tokenizer.from_file(str(files.fetch(file)))
    except Exception as error:  # the library raises plain Exception for damaged files
        raise DataError(f"{file}: no tokeniser file ({error})") from None
    _check_size(library.get_vocab_size(), vocabulary_size, file)
    library.no_padding()
    library.no_truncation()
    library.encode_special_tokens = True  # special tokens in a text are spelt out
    return library


def read_sentencepiece(file: Path, vocabulary_size: int) -> Any:
    """The processor of a `spiece.model`. Raises `DataError` as `read_json`, and without an end."""
    try:
        import sentencepiece  # pyright: ignore[reportMissingImports]  # extra siglip
    except ModuleNotFoundError:
        raise _missing("sentencepiece", file) from None
    try:
        pieces: Any = sentencepiece.SentencePieceProcessor(model_file=str(files.fetch(file)))
    except (OSError, RuntimeError) as error:
        raise DataError(f"{file}: no sentencepiece model ({error})") from None
    _check_size(pieces.vocab_size(), vocabulary_size, file)
    if pieces.eos_id() < 0:
        raise DataError(f"{file}: the sentencepiece model has no end token")
    return pieces


def id_of(library: Any, token: str, file: Path) -> int:
    """The id of a token. Raises `DataError` if the vocabulary lacks it."""
    found = library.token_to_id(token)
    if found is None:
        raise DataError(f"{file}: the vocabulary has no {token}")
    return found


def _check_size(size: int, vocabulary_size: int, file: Path) -> None:
    if size > vocabulary_size:
        raise DataError(
            f"{file}: {size} entries, but config.model.text.vocabulary_size is {vocabulary_size}"
        )


def _missing(package: str, file: Path) -> DataError:
    return DataError(f"{file}: reading it needs {package}: {installation('siglip')}")
