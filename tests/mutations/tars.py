"""Tar files of image-text pairs, built member by member and header by header, and mutated."""

import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tests.mutations import raw
from tests.mutations.trees import pick

_FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
_NAMES = (
    *("/abs/0.jpg", "../0.jpg", "a/../../b.jpg", "0.jpg", ".jpg", "._0.jpg", "x", "0", "a b.jpg"),
    *("0.v2.jpg", "0.1.jpg", "d.x/0.jpg", "d/0.JPG", "0.jpeg", "0.png", "0.cls", "0.JSON", "é.jpg"),
    *("0.txt.jpg", "0.jpg.txt", "__MACOSX/0.jpg", "n" * 90 + ".jpg", "d/" * 60 + "0.jpg", "0.npz"),
)
_TYPES = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)
_TYPES += (tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE, tarfile.AREGTYPE)
_TEXTS = (
    b"",
    b" \n",
    b"\xff\xfe",
    b"\xef\xbb\xbfa dog",
    b"a\0b",
    b"0 0.5 0.5 0.1 0.1\n",
    b"x" * 5000,
)
_JSONS = (b"{}", b"[]", b'{"caption": 5}', b'{"caption": ["a", 2]}', b'{"text": "a cat"}', b"{")
_JSONS += (b"[" * 100_000, b'{"caption": "\\ud800"}', b'{"CAPTION": "a"}', b'{"a": 1}', b"nan")


@dataclass(frozen=True, kw_only=True)
class Part:
    """A member before it is written."""

    name: str
    content: bytes
    type: bytes = tarfile.REGTYPE
    link: str = ""
    pax: dict[str, str] = field(default_factory=dict)


def mutated(parts: Sequence[Part], rng: np.random.Generator) -> list[Part]:
    """The members with one random change."""
    parts = list(parts)
    if not parts:
        return parts
    at = int(rng.integers(len(parts)))
    part = parts[at]
    kind = pick(
        rng, ("name", "name", "type", "content", "content", "double", "drop", "order", "pax")
    )
    if kind == "name":
        parts[at] = replace(part, name=pick(rng, _NAMES))
    elif kind == "type":
        parts[at] = replace(part, type=pick(rng, _TYPES), link=pick(rng, ("0.jpg", "/etc/passwd")))
    elif kind == "content":
        hostile = _JSONS if part.name.endswith("json") else _TEXTS
        options = (pick(rng, hostile), pick(rng, hostile), raw.mutated(part.content, rng))
        parts[at] = replace(part, content=pick(rng, options))
    elif kind == "double":
        parts.insert(int(rng.integers(len(parts) + 1)), part)
    elif kind == "drop":
        del parts[at]
    elif kind == "order":
        order = rng.permutation(len(parts))
        parts = [parts[i] for i in order]
    else:
        parts[at] = replace(part, pax=pick(rng, _PAX))
    return parts


_PAX = (
    {"path": "other.jpg"},
    {"path": "../../up.jpg"},
    {"size": "999999999999"},
    {"size": "-5"},
    {"size": "12x"},
    {"mtime": "nan"},
    {"comment": "c" * 2000},
    {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"},
    {"GNU.sparse.map": "0,1,x"},
    {"GNU.sparse.size": "9" * 30},
    {"hdrcharset": "klingon"},
    {"linkpath": "/etc/passwd"},
)


def written(parts: Sequence[Part], rng: np.random.Generator) -> bytes:
    """The tar file, of a random one of the three formats."""
    buffer = io.BytesIO()
    kind = pick(rng, _FORMATS)
    if any(part.pax or not part.name.isascii() or len(part.name) > 90 for part in parts):
        kind = tarfile.PAX_FORMAT
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for part in parts:
            member = tarfile.TarInfo(part.name)
            member.type, member.linkname = part.type, part.link
            member.pax_headers = part.pax
            has_content = part.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
            member.size = len(part.content) if has_content else 0
            tar.addfile(member, io.BytesIO(part.content))
    return buffer.getvalue()


_FIELDS = {  # of a header: where they start and how long they are
    "name": (0, 100),
    "mode": (100, 8),
    "uid": (108, 8),
    "size": (124, 12),
    "mtime": (136, 12),
    "checksum": (148, 8),
    "type": (156, 1),
    "link": (157, 100),
    "magic": (257, 8),
    "prefix": (345, 155),
}
_VALUES = (
    *(b"", b"\0", b"\xff", b"\x80", b"77777777777", b"99999999999", b"-0000000001", b"00000000000"),
    *(
        b"\x80" + bytes(10) + b"\x09",
        b"\xff" * 12,
        b"\x80\x7f" + b"\xff" * 10,
        b"0",
        b"5",
        b"x",
        b"g",
    ),
    *(b"L", b"K", b"S", b"D", b"1", b"2", b"  12 ", b"../../x.jpg", b"\xe9\xe8.jpg", b"a/", b"/"),
)


def with_other_header(content: bytes, rng: np.random.Generator) -> bytes:
    """One field of one header becomes something else, mostly with a checksum that fits."""
    headers = [i for i in range(0, len(content), 512) if content[i + 257 : i + 262] == b"ustar"]
    if not headers:
        return content
    at = pick(rng, headers)
    start, length = _FIELDS[pick(rng, list(_FIELDS))]
    block = bytearray(content[at : at + 512])
    block[start : start + length] = pick(rng, _VALUES)[:length].ljust(length, b"\0")
    if start != 148 and rng.random() < 0.8:
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
    return content[:at] + bytes(block) + content[at + 512 :]
