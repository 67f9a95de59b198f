"""WebDataset: .tar files in which consecutive members of one key are one sample.

The key is the name up to the first dot of the file name (its folders may hold dots), what follows
is the extension. Nothing is extracted or unpickled.
"""

import errno
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from absl import logging

from data_pipelines import image_files
from data_pipelines.readers import captions
from data_pipelines.readers.image_text_shards import (
    Place,
    Sample,
    Unreadable,
    read_spans,
    version_of,
    what_it_is,
)
from owl_det import files
from owl_det.errors import DataError

MAX_MEMBER_BYTES = 256 * 2**20  # of one image or text
TEXT_EXTENSIONS = ("txt", "text", "caption", "captions", "json")  # the first that is not empty


class TarShards:
    """The samples of .tar files, one shard a file. Implements `LocatedShards`."""

    def __init__(self, where: str, files: Sequence[Path]):
        self._files = files
        self.name, self.version = where, version_of("webdataset", files)

    def __len__(self) -> int:
        return len(self._files)

    def samples(self, shard: int) -> Iterator[Sample | Unreadable]:
        for place in self.locate(shard):
            yield place if isinstance(place, Unreadable) else self._read(shard, place)

    def locate(self, shard: int) -> Iterator[Place | Unreadable]:
        """Every image is in a sample, is `Unreadable`, or is counted in a warning."""
        file = self._files[shard]
        key, members = "", list[Member]()
        num_members, further = 0, list[str]()
        for member in _members(file):
            if members and (member.key != key or member.is_damage):
                yield from _places(key, members, further)
                members = []
            if member.is_damage:
                yield Unreadable(key=member.name, reason=member.refused, is_damage=True)
                break
            num_members += 1
            key = member.key
            members.append(member)
        else:
            if members:
                yield from _places(key, members, further)
            elif not num_members:
                yield Unreadable(
                    key=file.name, reason="the tar file holds no files", is_damage=True
                )
        if further:
            logging.warning(
                "%s: %d images are left out, such as %s: their samples have another that is taken",
                *(file, len(further), further[0]),
            )

    def fetch(self, shard: int, place: Place) -> Sample | Unreadable:
        try:
            return self._read(shard, place)
        except OSError as error:
            return Unreadable(key=place.key, reason=f"{self._files[shard].name}: {error}")

    def _read(self, shard: int, place: Place) -> Sample | Unreadable:
        *image_span, text_offset, text_size, is_json = place.numbers
        image, text = read_spans(self._files[shard], [image_span, (text_offset, text_size)])
        try:
            if is_json:
                found = captions.of_entry(json.loads(text))
            else:
                found = captions.of_text(text, place.key)
        except (DataError, ValueError, RecursionError) as error:
            return Unreadable(key=place.key, reason=f"its text cannot be read: {error}")
        return Sample(key=place.key, image=image, texts=found.texts, note=found.note)


@dataclass(frozen=True, kw_only=True)
class Member:
    """A regular file in a tar file, or the place where the tar file is damaged."""

    name: str
    offset: int = 0  # of its bytes in the tar file
    size: int = 0
    refused: str = ""  # why it is not read; empty = it is
    is_damage: bool = False

    @property
    def key(self) -> str:
        folder, _, file = self.name.rpartition("/")
        first = file.partition(".")[0]
        return f"{folder}/{first}" if folder else first

    @property
    def extension(self) -> str:
        return self.name.rpartition("/")[2].partition(".")[2].lower()

    @property
    def is_image(self) -> bool:
        """Also for "image.jpg" and "JPEG"."""
        return image_files.is_image(f"x.{self.extension}")


def _members(file: Path) -> Iterator[Member]:
    """The regular files, from their headers alone; what follows damage is lost.

    Hidden files are left out. Raises `OSError` where the file system fails, which is no damage.
    """
    damage = "the tar file is damaged from here on"
    try:
        size = file.stat().st_size
        with tarfile.open(files.fetch(file), "r:") as tar:
            for member in tar:
                # tarfile would keep every header.
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
                if member.size < 0:
                    raise tarfile.ReadError("a negative size")
                name = _utf8(member.name)
                if image_files.is_hidden(name) or member.isdir():
                    continue
                if not member.isfile():
                    if image_files.is_image(name):
                        yield Member(name=name, refused="a link or device; it is not followed")
                    continue
                if member.issparse() or member.size > MAX_MEMBER_BYTES:
                    reason = f"{member.size} bytes; the limit is {MAX_MEMBER_BYTES}"
                    reason = "a sparse file" if member.issparse() else reason
                    yield Member(name=name, refused=reason)
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                yield Member(name=name, offset=member.offset_data, size=member.size)
            # tarfile takes a damaged header for the end; a whole file ends in zeros.
            if not _ends_in_zeros(file, tar.offset):
                yield Member(name=f"{file.name}@{tar.offset}", refused=damage, is_damage=True)
            elif _goes_on(file, tar.offset):
                reason = "more follows the end of the tar file, as where files are joined by cat"
                yield Member(
                    name=f"{file.name}@{tar.offset}",
                    refused=f"{reason}; it is not read: keep them apart",
                    is_damage=True,
                )
    # ValueError: of malformed pax headers. The last two: of absurd sizes.
    except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: of absurd offsets
            raise
        kind = what_it_is(file)
        reason = f"the file is no tar file: it is {kind}" if kind else damage
        yield Member(name=f"{file.name} ({error})", refused=reason, is_damage=True)


def _utf8(name: str) -> str:
    """A member's name; bytes that are no UTF-8 are written out."""
    return name.encode("utf-8", "backslashreplace").decode()


def _ends_in_zeros(file: Path, offset: int) -> bool:
    return not files.open_range(file, offset, tarfile.BLOCKSIZE).strip(b"\0")


def _goes_on(file: Path, offset: int) -> bool:
    """True if there is anything but zeros from `offset` on."""
    with files.open_read(file) as opened:
        opened.seek(offset)
        while chunk := opened.read(2**20):
            if chunk.strip(b"\0"):
                return True
    return False


def _places(
    key: str, members: Sequence[Member], further: list[str]
) -> Iterator[Place | Unreadable]:
    """The sample of one key; or each of its images, and why there is none.

    Of an extension that occurs twice the last counts, as in tar itself. `further` gets the names of
    images that are left out beside the one that is taken.
    """
    by_extension = {member.extension: member for member in members}
    images = [member for member in by_extension.values() if member.is_image]
    twice = [m for m in members if m.is_image and by_extension[m.extension] is not m]
    for member in twice:
        yield Unreadable(key=key, reason=f"{member.name} occurs twice; the last one is taken")
    if not images:
        refused = [member.refused for member in members if member.refused]
        reason = f"no image among the members {', '.join(by_extension)}"
        yield Unreadable(key=key, reason=refused[0] if refused else reason)
        return
    plain = [member for member in images if "." not in member.extension]
    if len(images) > 1 and not plain:
        for member in images:
            yield Unreadable(
                key=member.name,
                reason=f"WebDataset's key ends at the first dot of the file name, so {len(images)} "
                f"images have the key {key!r}; rename them without dots before the extension",
            )
        return
    image = (plain or images)[0]
    further += [member.name for member in images if member is not image]
    yield _place(key, image, by_extension)


def _place(key: str, image: Member, by_extension: Mapping[str, Member]) -> Place | Unreadable:
    """Where the image and the text of a sample are: offset and size each, and if it is JSON."""
    start = image.extension.rpartition(".")[0]
    starts = (f"{start}.", "") if start else ("",)
    names = [start + extension for extension in TEXT_EXTENSIONS for start in starts]
    texts = [(name, by_extension[name]) for name in names if name in by_extension]
    refused = [m.refused for m in (image, *(m for _, m in texts)) if m.refused]
    if refused:
        return Unreadable(key=key, reason=refused[0])
    # An empty text says nothing.
    name, text = next(((n, m) for n, m in texts if m.size), ("", Member(name="")))
    numbers = (image.offset, image.size, text.offset, text.size, int(name.endswith("json")))
    return Place(key=key, numbers=numbers, has_text=text.size > 0)
