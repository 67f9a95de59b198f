"""The last line of a command: what it did, on stderr, where stdout holds results."""

import sys


def say(text: str) -> None:
    print(f"owl-det: {text}", file=sys.stderr, flush=True)


def many(count: int, noun: str) -> str:
    """`1 image`, `1,024 images`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def size(num_bytes: int) -> str:
    """In decimal units: `12 MB`."""
    value, units = float(num_bytes), ["bytes", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"
