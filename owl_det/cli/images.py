"""Images that a command is given, and where the pictures it draws go."""

import sys
from collections import Counter
from pathlib import Path

from absl import logging

from owl_det import files
from owl_det.errors import ExitCode, UserError


def image_paths(arguments: list[str], out: str | None = None) -> list[Path]:
    """The named files, and all images of the named folders and their subfolders.

    Hidden files are left out, and so is `out`, where pictures of an earlier run may lie. Files that
    are no images are counted on stderr. Raises `UserError` if a path is absent or nothing is left.
    """
    from data_pipelines import image_files

    paths: list[Path] = []
    empty: list[str] = []
    for path in (files.local(argument, "IMAGE") for argument in arguments):
        if path.is_dir():
            found = image_files.find(path, leave_out=Path(out) if out else None)
            paths += [path / name for name in found.images]
            if not found.images:
                empty.append(found.nothing())
            for line in found.lines():
                logging.warning("%s", line)
        elif path.exists():
            paths.append(path)
        else:
            raise UserError(f"{path}: no such file or folder{files.did_you_mean(path)}")
    if not paths:
        raise UserError("; ".join(empty))
    return paths


def picture_paths(out: Path, paths: list[Path]) -> list[Path]:
    """Where the picture of each image goes: `<out>/<stem>.png`.

    With the folder's name in front where stems are the same, and a number where that is no help.
    Raises `UserError` if a picture would take the place of an image.
    """
    stems = Counter(path.stem for path in paths)
    names = [p.stem if stems[p.stem] == 1 else f"{p.parent.name}_{p.name}" for p in paths]
    uses, seen = Counter(names), Counter[str]()
    targets: list[Path] = []
    for name in names:
        seen[name] += 1
        targets.append(out / (f"{name}.png" if uses[name] == 1 else f"{name}_{seen[name]}.png"))
    images = {path.resolve() for path in paths}
    for target in targets:
        if target.resolve() in images:
            raise UserError(f"--out {out}: {target} is one of the images; name another folder")
    return targets


def exit_code(num_failed: int, num_images: int) -> int:
    """`LOSSES` if images could not be read; says so, and how many files end early."""
    from data_pipelines import image_ops

    early = image_ops.take_early_ends()
    if early:
        logging.warning("%d images end early: read as far as they go", early)
    if num_failed:
        print(f"owl-det: {num_failed} of {num_images} images could not be read", file=sys.stderr)
    return ExitCode.LOSSES if num_failed else ExitCode.DONE
