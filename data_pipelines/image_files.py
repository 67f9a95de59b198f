"""Which files are images: one rule for every command and reader that is given a folder."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from absl import logging

# Those of the formats that `image_ops` decodes, by how common they are.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"),
    *(".jpe", ".jfif", ".mpo", ".apng", ".dib", ".avif", ".avifs"),
    *(".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm"),
)
# What systems leave beside files: thumbnails, halves of archives that macOS packed.
_HIDDEN_FOLDERS = ("__MACOSX", "@eaDir")
_MAX_KINDS = 5  # of other files that a message names


@dataclass(frozen=True, kw_only=True)
class FoundFiles:
    """What lies in a folder and its subfolders; hidden files are left out."""

    folder: Path
    images: tuple[str, ...]  # sorted, relative to the folder, with "/"
    others: frozenset[str]  # likewise, of files that are no images
    links: tuple[str, ...] = ()  # likewise, of folders that are links: they are not searched

    def nothing(self, what: str = "images") -> str:
        """That there are none, and what is there instead."""
        there = f"only {kinds(self.others)}" if self.others else "it holds no files"
        linked = f"; {self.of_links()}" if self.links else ""
        return f"{self.folder}: no {what} there; {there}{linked}"

    def of_links(self) -> str:
        """What to say of links to folders."""
        count = len(self.links)
        said = "1 link to a folder is" if count == 1 else f"{count} links to folders are"
        return f"{said} not followed, such as {self.links[0]}; name what it leads to"

    def lines(self) -> list[str]:
        """What a user should hear of it: images in subfolders, and files that are no images."""
        below = [name for name in self.images if "/" in name]
        lines: list[str] = []
        if below:
            where = ", ".join(sorted({name.split("/")[0] for name in below})[:_MAX_KINDS])
            lines.append(
                f"{self.folder}: {len(below)} of {len(self.images)} images lie in subfolders "
                f"({where}), which are searched too"
            )
        if self.links:
            lines.append(f"{self.folder}: {self.of_links()}")
        if self.others:
            count = len(self.others)
            said = "1 file is no image" if count == 1 else f"{count} files are no images"
            lines.append(f"{self.folder}: {said}, left out: {kinds(self.others)}")
        return lines


def is_image(name: str | Path) -> bool:
    """By the suffix: the file may still be damaged."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def is_hidden(name: str) -> bool:
    """True for `.DS_Store`, `._a.jpg` and whatever lies in a hidden folder; `name` is relative."""
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    return any(part.startswith(".") or part in _HIDDEN_FOLDERS for part in parts)


def find(folder: Path, leave_out: Path | None = None) -> FoundFiles:
    """All files of a folder and its subfolders, but for hidden ones and those below `leave_out`.

    Links to folders are not followed. Subfolders that may not be read are logged.
    """
    images: list[str] = []
    others: list[str] = []
    links: list[str] = []
    out = None if leave_out is None else leave_out.resolve()
    for root, folders, names in os.walk(folder, onerror=_warn):
        folders[:] = [
            name
            for name in folders
            if not is_hidden(name) and (out is None or (Path(root) / name).resolve() != out)
        ]
        inside = Path(root).relative_to(folder)
        links += [
            (inside / name).as_posix() for name in folders if os.path.islink(Path(root, name))
        ]
        for name in names:
            if not is_hidden(name):
                (images if is_image(name) else others).append((inside / name).as_posix())
    return FoundFiles(
        folder=folder,
        images=tuple(sorted(images)),
        others=frozenset(others),
        links=tuple(sorted(links)),
    )


def kinds(names: Iterable[str]) -> str:
    """How many files there are of each suffix: `8 .txt, 1 .heic`."""
    suffixes = Counter(os.path.splitext(name)[1].lower() or "without a suffix" for name in names)
    return listed(suffixes)


def listed(counts: Mapping[str, int]) -> str:
    """The largest counts first, and how many kinds more there are."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    more = f" and {len(ranked) - _MAX_KINDS} kinds more" if len(ranked) > _MAX_KINDS else ""
    return ", ".join(f"{count:,} {kind}" for kind, count in ranked[:_MAX_KINDS]) + more


def _warn(error: OSError) -> None:
    logging.warning("%s: %s; what it holds is left out", error.filename, error.strerror)
