"""Mutations of bytes: what transport, editors and programs of other kinds do to a file."""

import gzip

import numpy as np

from tests.mutations.trees import pick

HTML = b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head><body>no</body></html>\n"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0f\nsize 12345\n"


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """The bytes with one random change."""
    kind = pick(rng, _KINDS)
    at = int(rng.integers(len(content) + 1))
    if kind == "cut":
        return content[:at]
    if kind == "drop":
        return content[:at] + content[at + int(rng.integers(1, 20)) :]
    if kind == "repeat":
        return content[:at] + content[max(0, at - int(rng.integers(1, 60))) :]
    if kind == "flip":
        return flipped(content, rng, int(rng.integers(1, 4)))
    if kind == "insert":
        return content[:at] + pick(rng, _INSERTED) + content[at:]
    if kind == "around":
        return pick(rng, _INSERTED) + content + pick(rng, _INSERTED)
    if kind == "digits":
        return _with_digit(content, rng)
    return _whole(content, rng)


def flipped(content: bytes, rng: np.random.Generator, number: int) -> bytes:
    """So many bytes become random ones."""
    if not content:
        return content
    values = np.frombuffer(content, np.uint8).copy()
    values[rng.integers(len(values), size=number)] = rng.integers(256, size=number)
    return values.tobytes()


def _with_digit(content: bytes, rng: np.random.Generator) -> bytes:
    """One digit becomes another."""
    places = [i for i, byte in enumerate(content) if 0x30 <= byte <= 0x39]
    if not places:
        return content
    at = pick(rng, places)
    return content[:at] + str(rng.integers(10)).encode() + content[at + 1 :]


def _whole(content: bytes, rng: np.random.Generator) -> bytes:
    """Another file in its place, or the same in another form."""
    text = content.decode("utf-8", "replace")
    options = (
        *(b"", HTML, LFS, b"\0" * len(content), content * 2, gzip.compress(content, mtime=0)),
        *(text.encode("utf-16"), text.encode("utf-32"), b"\xef\xbb\xbf" + content),
        *(content.replace(b"\n", b"\r\n"), content.replace(b"\n", b"\r"), content[::-1]),
        rng.integers(256, size=200, dtype=np.uint8).tobytes(),
    )
    return pick(rng, options)


_KINDS = ("cut", "drop", "repeat", "flip", "flip", "insert", "around", "digits", "whole")
_INSERTED = (b"\0", b"\xff", b"\xef\xbb\xbf", b"\n", b"\r", b" ", b",", b"}", b"<", b'"', b"\xc3")
_INSERTED += (b"\x1a", b"\xe2\x80\xa8", b"# x\n", b"&amp;", b"nan", b"-", b"1e999")
