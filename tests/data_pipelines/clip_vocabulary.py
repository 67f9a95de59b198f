"""CLIP's vocabulary as other libraries want it, read out of the package that ships it."""

import hashlib
import importlib.util
from pathlib import Path

# Of the merges in OpenAI's bpe_simple_vocab_16e6.txt that CLIP uses, one a line.
SHA256 = "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"
_NUM_MERGES = 49152 - 256 - 2


def merges() -> list[str]:
    """The merges, first the most frequent: `instant-clip-tokenizer` holds the file as it is."""
    found = importlib.util.find_spec("instant_clip_tokenizer")
    assert found is not None and found.origin is not None
    (library,) = Path(found.origin).parent.glob("*.so")
    lines = library.read_bytes().split(b"#version: 0.2\n", 1)[1].split(b"\n", _NUM_MERGES)
    made = [line.decode() for line in lines[:_NUM_MERGES]]
    assert hashlib.sha256("\n".join(made).encode()).hexdigest() == SHA256
    return made


def vocabulary() -> dict[str, int]:
    """Bytes, bytes at the end of a word, merges, special tokens: names by id."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    characters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(rest))]
    names = [*characters, *(f"{c}</w>" for c in characters)]
    names += [merge.replace(" ", "") for merge in merges()]
    names += ["<|startoftext|>", "<|endoftext|>"]
    return {name: i for i, name in enumerate(names)}


def texts(number: int) -> list[str]:
    """Awkward and ordinary texts, always the same: at least `number` of them."""
    import random

    rng = random.Random(0)
    words = (
        "a photo of the small WHITE cat dog Café naïve straße it's we're I'd don't rock'n'roll "
        "x-ray 3.14 1,000 50% $9.99 C++ #hashtag @user http://a.bc/d?e=f&g 東京 привет שלום "
        "مرحبا नमस्ते 안녕 สวัสดี ελληνικά İstanbul ﬁne ½ ²³ Ⅷ № ® ™ … — “quoted” ‘s «x» 🙂 👩‍🚀 🇯🇵 🏳️‍🌈 "
        "e\u0301 a\u0308 \u00a0 \u200b \u2028 \t \n __init__ <b> [x] {y} ~`^ \\ / | ' \" ''"
    ).split(" ")
    fixed = ["", " ", "\n\t", "a" * 3000, "word " * 500, "🙂" * 200, "'", "''s", "it's 's", "1234"]
    blocks = [(32, 127), (160, 592), (880, 1280), (1424, 1791), (2304, 2432), (8192, 8304)]
    blocks += [(12352, 12544), (19968, 20200), (44032, 44200), (128512, 128592)]
    made = list(fixed)
    while len(made) < number:
        if rng.random() < 0.6:
            made.append(" ".join(rng.choices(words, k=rng.randint(1, 12))))
            continue
        low, high = rng.choice(blocks)
        made.append("".join(chr(rng.randrange(low, high)) for _ in range(rng.randint(1, 40))))
    return made
