"""CLIP's vocabulary as other libraries want it, and texts to try it on."""

import random

from owl_det.convert import clip_vocabulary


def merges() -> list[tuple[str, str]]:
    """Pairs, first the most frequent."""
    pairs = (merge.split(" ") for merge in clip_vocabulary.read_merges())
    return [(left, right) for left, right in pairs]


def vocabulary() -> dict[str, int]:
    tokens = clip_vocabulary.tokens(clip_vocabulary.read_merges())
    return {token: i for i, token in enumerate(tokens)}


def texts(number: int) -> list[str]:
    """Awkward and ordinary texts, always the same: at least `number` of them."""
    rng = random.Random(0)
    words = (
        "a photo of the small WHITE cat dog Café naïve straße it's we're I'd don't rock'n'roll "
        "x-ray 3.14 1,000 50% $9.99 C++ #hashtag @user http://a.bc/d?e=f&g 東京 привет שלום "
        "مرحبا नमस्ते 안녕 สวัสดี ελληνικά İstanbul ﬁne ½ ²³ Ⅷ № ® ™ … — “quoted” ‘s "
        "«x» 🙂 👩‍🚀 🇯🇵 🏳️‍🌈 "
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
