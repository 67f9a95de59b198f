"""Headers that claim to be huge cost nothing: each file is read under a limit of memory.

The limit is on addresses, so that a reader that asks for the memory fails even where the system
would hand it out untouched.
"""

import io
import json
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import msgpack
import pytest

from tests.mutations import pictures

_OUTCOMES = ("read", "DataError", "CheckpointError", "UnreadableImage")
_MEGABYTES = 64  # that a reader of one small file may ask for
_READ = """
import resource, sys
from owl_det.errors import UserError
from data_pipelines.open_source import open_source
from data_pipelines.readers import coco, image_text_reader, tar_shards, voc, yolo
from owl_det.config import CocoSource, ImageTextSource, VocSource, YoloSource
from owl_det.convert import weights
kind, path = sys.argv[1:]
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {megabytes} * 2**20,) * 2)
entries = {{
    "coco": CocoSource(path=path), "voc": VocSource(path=path), "yolo": YoloSource(path=path),
    "tar": ImageTextSource(path=path),
}}
try:
    if kind == "weights":
        opened = weights.open_weights(path + "/weights")
        [opened.read(name) for name in opened.shapes]
    else:
        opened = open_source(entries[kind], "")
        [opened[i] for i in range(len(opened))]
except (UserError, ValueError) as error:
    print(type(error).__name__, str(error))
else:
    print("read")
"""


def _tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        member = tarfile.TarInfo("a.jpg")
        member.size = 2**60
        tar.addfile(member)
    return buffer.getvalue()


def _npy(shape: str) -> bytes:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    content = b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header.encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", content)
    return buffer.getvalue()


def _safetensors(shape: list[int], end: int) -> bytes:
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}
    header = json.dumps({"a": entry}).encode()
    return struct.pack("<Q", len(header)) + header


def _msgpack(shape: list[int]) -> bytes:
    packed = msgpack.packb((shape, "float32", b""))
    content = msgpack.packb({"a": msgpack.ExtType(1, packed or b"")})
    return content or b""


def _png(width: int, height: int) -> bytes:
    """A small file whose header tells of another size."""
    content = bytearray(pictures.png(8, 8))
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def _coco(**changes: object) -> bytes:
    image = {"id": 1, "file_name": "a.png", "width": 8, "height": 8, **changes}
    box = {"image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4]}
    content = {"images": [image], "annotations": [box], "categories": [{"id": 1, "name": "cat"}]}
    return json.dumps(content).encode()


_VOC = (
    b"<annotation><size><width>%d</width><height>%d</height></size><object><name>cat</name><bndbox>"
    b"<xmin>1</xmin><ymin>1</ymin><xmax>4</xmax><ymax>4</ymax></bndbox></object></annotation>"
)
_BOMB = b"a: &a [x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (i + 1, i + 1, b", ".join([b"*%c" % i] * 9)) for i in range(97, 107)
)
_FILES: dict[str, tuple[str, dict[str, bytes]]] = {
    "tar member": ("tar", {"x.tar": _tar()}),
    "npz shape": ("weights", {"weights": _npy("(1000000000000,)")}),
    "npz empty shape": ("weights", {"weights": _npy("(0, 1000000000000)")}),
    "safetensors header": ("weights", {"weights": struct.pack("<Q", 2**31) + b"{}"}),
    "safetensors shape": ("weights", {"weights": _safetensors([2**40], 2**42)}),
    "msgpack shape": ("weights", {"weights": _msgpack([2**38])}),
    "msgpack map": ("weights", {"weights": b"\xdf\xff\xff\xff\xff"}),
    "msgpack array": ("weights", {"weights": b"\x81\xa1a\xdd\xff\xff\xff\xff"}),
    "msgpack bytes": ("weights", {"weights": b"\x81\xa1a\xc6\xff\xff\xff\xff"}),
    "coco size": ("coco", {"annotations.json": _coco(width=10**12), "images/a.png": _png(8, 8)}),
    "coco id": ("coco", {"annotations.json": _coco(id=10**4000), "images/a.png": _png(8, 8)}),
    "coco image": ("coco", {"annotations.json": _coco(), "images/a.png": _png(2**30, 2**30)}),
    "voc size": (
        "voc",
        {"Annotations/a.xml": _VOC % (10**12, 8), "JPEGImages/a.png": _png(8, 8)},
    ),
    "yolo names": (
        "yolo",
        {
            "data.yaml": _BOMB + b"names: [cat, *k]\n",
            "images/a.png": _png(8, 8),
            "labels/a.txt": b"0 0.5 0.5 0.2 0.2\n",
        },
    ),
    "yolo class numbers": (
        "yolo",
        {
            "data.yaml": b"names: {0: cat, 999999999999: dog}\n",
            "images/a.png": _png(8, 8),
            "labels/a.txt": b"999999999999 0.5 0.5 0.2 0.2\n",
        },
    ),
}


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is that of Linux")
@pytest.mark.parametrize("name", _FILES)
def test_absurd_headers_cost_no_memory(name: str, tmp_path: Path) -> None:
    kind, files = _FILES[name]
    for file, content in files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(content)
        assert len(content) < 20_000
    command = [sys.executable, "-c", _READ.format(megabytes=_MEGABYTES), kind, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout.strip().splitlines()
    assert len(said) == 1 and said[0].split()[0] in _OUTCOMES, said
