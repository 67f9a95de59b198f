"""The files of CLIP's tokeniser (tokenizer.json, vocab.json, merges.txt, settings), offline.

The package `instant-clip-tokenizer` carries OpenAI's list of merges inside its compiled module and
has no function that gives it. It is read from there as text, and taken only if its hash is that of
the published list.
"""

import hashlib
import importlib.util
import json
from pathlib import Path

from owl_det import files
from owl_det.convert.weights import read_json
from owl_det.errors import CheckpointError

SIZE = 49408  # 256 bytes, the same at the end of a word, merges, two special tokens
START, END = 49406, 49407

_START_TOKEN, _END_TOKEN = "<|startoftext|>", "<|endoftext|>"
# What the rules of `tokenizers` cut a text into, and how they write its bytes.
_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
_BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
_MARK = b"#version: 0.2\n"  # the first line of the list
_NUM_MERGES = SIZE - 2 * 256 - 2
_SHA256 = "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"  # of the merges


def write(folder: Path, *, max_length: int) -> None:
    """Writes the tokeniser into an existing folder as transformers' CLIPTokenizer reads it.

    `max_length` is the number of text positions. Raises `CheckpointError` if the installed package
    does not hold the list.
    """
    merges = read_merges()
    vocabulary = _vocabulary(merges)
    files.write_atomic(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    files.write_atomic(folder / "merges.txt", "\n".join(["#version: 0.2", *merges]) + "\n")
    whole = json.dumps(_tokenizer_json(merges), ensure_ascii=False)
    files.write_atomic(folder / "tokenizer.json", whole)
    special = {
        "bos_token": _START_TOKEN,
        "eos_token": _END_TOKEN,
        "unk_token": _END_TOKEN,
        # What CLIP pads with. Published OWL-ViT folders pad with "!" (id 0), which makes padding of
        # each "!" in a text too; what follows the first end token is never looked at.
        "pad_token": _END_TOKEN,
    }
    settings = {
        **special,
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": max_length,
        "do_lower_case": True,
        "add_prefix_space": False,
    }
    for name, value in (("special_tokens_map", special), ("tokenizer_config", settings)):
        files.write_atomic(folder / f"{name}.json", json.dumps(value, indent=2) + "\n")


def own_tokenizer(folder: Path) -> str:
    """The folder's tokenizer.json; empty if there is none, or its ids are those of CLIP.

    Raises `CheckpointError` if it cannot be read.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        return ""
    model = read_json(file).get("model")
    given = model.get("vocab") if isinstance(model, dict) else None
    return "" if given == _vocabulary(read_merges()) else str(file)


def _vocabulary(merges: list[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(tokens(merges))}


def _tokenizer_json(merges: list[str]) -> dict[str, object]:
    """The same tokeniser in the format of the `tokenizers` library."""
    special = [(START, _START_TOKEN), (END, _END_TOKEN)]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": token, **flags, "special": True} for number, token in special
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFC"},
                {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
                {"type": "Lowercase"},
            ],
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": _WORDS},
                    "behavior": "Removed",
                    "invert": True,
                },
                _BYTE_LEVEL,
            ],
        },
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": [_END_TOKEN, END],
            "cls": [_START_TOKEN, START],
            "trim_offsets": False,
            "add_prefix_space": False,
        },
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": _END_TOKEN,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": False,
            "vocab": _vocabulary(merges),
            "merges": merges,
        },
    }


def read_merges() -> list[str]:
    """Pairs of tokens, in the order in which they are joined. Raises `CheckpointError`."""
    package = importlib.util.find_spec("instant_clip_tokenizer")
    folders = package.submodule_search_locations if package else None
    for folder in folders or ():
        for module in Path(folder).glob("instant_clip_tokenizer*"):
            data = files.read_bytes(module)
            start = data.find(_MARK)
            lines = data[start + len(_MARK) :].split(b"\n", _NUM_MERGES)[:_NUM_MERGES]
            if start >= 0 and hashlib.sha256(b"\n".join(lines)).hexdigest() == _SHA256:
                return [line.decode("utf-8") for line in lines]
    raise CheckpointError(
        "CLIP's list of merges is not in the installed instant-clip-tokenizer; "
        "pip install instant-clip-tokenizer==0.1.1"
    )


def tokens(merges: list[str]) -> list[str]:
    """Every token in the order of the ids."""
    letters = list(byte_letters().values())
    joined = [merge.replace(" ", "") for merge in merges]
    return [*letters, *(f"{x}</w>" for x in letters), *joined, _START_TOKEN, _END_TOKEN]


def byte_letters() -> dict[int, str]:
    """A printable letter for each byte (GPT-2): itself where it is one, else from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    return letters | {byte: chr(256 + i) for i, byte in enumerate(others)}
