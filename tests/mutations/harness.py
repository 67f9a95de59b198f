"""Reads one mutated input after another, and judges what came of each.

A reader may succeed, or refuse with one line that names the file or key. It may not do anything
else: no other exception, no warning of Python's, no second of silence, no memory without end, no
code run that came with the data, no file written outside the folder of the test. `Case.verify` says
what else must hold after a success: that nothing was lost without a word.

Every input is drawn from its number alone, so that a failure is made again by that number.
"""

import contextlib
import logging
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from data_pipelines.image_ops import UnreadableImage
from owl_det.errors import UserError

SECONDS = 5.0  # of CPU time that one input may take: other programs may take the rest
MEGABYTES = 400  # that the process may grow by for one input; good ones take a few
_SHOWN = 12  # kinds of failures that a report has


def counts(some: int) -> pytest.MarkDecorator:
    """The same test twice: with a few inputs at once, and with ten thousand every night."""
    many = pytest.param(10_000, marks=pytest.mark.nightly)
    return pytest.mark.parametrize("count", [some, many], ids=["some", "many"])


COUNTS = counts(100)

_RUNS_CODE = (
    *("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "os.startfile"),
    *("subprocess.Popen", "pickle.find_class", "ctypes.dlopen"),
    *("socket.connect", "socket.getaddrinfo", "urllib.Request"),
)
_CHANGES_FILES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link")
_CHANGES_FILES += ("os.chmod", "os.truncate", "shutil.rmtree")
# Parts of paths of libraries that write code of their own: methods of classes, checks of shapes.
_WRITES_CODE = ("/dataclasses.py", "/collections/__init__.py", "/attr/", "/kw_only_dataclasses.py")
_WRITES_CODE += ("/jaxtyping/", "/beartype/", "<frozen")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True, kw_only=True)
class Case:
    """One input, written, and how it is read."""

    read: Callable[[], Any]  # the code under test, and nothing else
    # Assertions about what `read` returned and what was logged meanwhile.
    verify: Callable[[Any, list[str]], None]
    names: Sequence[str]  # a refusal has one of them: files, keys


class Forbidden(BaseException):
    """Something that reading data has no need of. Nobody catches it by accident."""


class TooSlow(BaseException):
    """One input took more than `SECONDS` of CPU time."""


def check(
    make: Callable[[np.random.Generator, Path], Case],
    count: int,
    folder: Path,
    *,
    min_share: float = 0.05,
) -> None:
    """Makes and reads the inputs 0 … `count` - 1 in `folder`; fails with the numbers that failed.

    `min_share` of them must be read, and as many refused: else the mutations test nothing.
    """
    outcomes: Counter[str] = Counter()
    failures: dict[str, list[int]] = {}
    for seed in range(count):
        try:
            outcomes[_outcome(make, seed, folder)] += 1
        except AssertionError as error:
            failures.setdefault(re.sub(r"(?<![:\w])\d[\d.]*", "N", str(error)), []).append(seed)
    if failures:
        pytest.fail(_report(failures, count, make), pytrace=False)
    for kind in ("read", "refused"):
        assert outcomes[kind] >= min_share * count, f"of {count} inputs: {dict(outcomes)}"


def reproduce(make: Callable[[np.random.Generator, Path], Case], seed: int) -> Any:
    """Writes input number `seed` into a new temporary folder and reads it, unwatched."""
    folder = Path(tempfile.mkdtemp())
    print(f"in {folder}")
    return read_and_verify(make(np.random.default_rng(seed), folder))


def read_and_verify(case: Case) -> Any:
    """What the reader returns; prints what it logs."""
    with _logged() as lines:
        value = case.read()
    print(*lines, sep="\n")
    case.verify(value, lines)
    return value


def _emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _outcome(make: Callable[[np.random.Generator, Path], Case], seed: int, folder: Path) -> str:
    """ "read" or "refused". Raises `AssertionError` whose text is the kind of failure."""
    case = make(np.random.default_rng(seed), _emptied(folder))
    before = _megabytes()
    try:
        with _logged() as lines, _watched(folder), _hurried():
            value = case.read()
    except (UserError, UnreadableImage) as error:
        check_message(str(error), case.names)
        return "refused"
    except (Exception, Forbidden, TooSlow) as error:
        raise AssertionError(f"{type(error).__name__} in {_place(error)}") from error
    finally:
        growth = _megabytes() - before
        assert growth < MEGABYTES, f"memory grew by more than {MEGABYTES} MB"
    try:
        case.verify(value, lines)
    except AssertionError as error:
        said = (str(error).splitlines() or [""])[0]
        raise AssertionError(f"lost in silence, in {_place(error)}: {said}") from error
    except Exception as error:  # the test's own parser cannot read what was read
        raise AssertionError(f"read, but {type(error).__name__} in {_place(error)}") from error
    return "read"


def check_message(message: str, names: Sequence[str]) -> None:
    """A message is one line that has one of the names."""
    assert "\n" not in message and message.strip(), "the message is not one line"
    assert any(name in message for name in names), f"no file or key is named by: {message[:150]}"


def records(opened: Any, *names: str) -> list[Any]:
    """All records of a source; None for an image that cannot be read, which names its file."""
    found = []
    for index in range(len(opened)):
        try:
            found.append(opened[index])
        except UnreadableImage as error:
            check_message(str(error), names)
            found.append(None)
    return found


def check_counts(opened: Any, records: Sequence[Any], num_boxes: int, lines: Sequence[str]) -> None:
    """The boxes of the files are those used and those dropped; records hold the used ones.

    `records` has None where an image cannot be read: then only the sum is checked.
    """
    counts = opened.counts
    found = counts.num_boxes + counts.num_crowd + sum(counts.dropped.values())
    assert found == num_boxes, f"{num_boxes} boxes in the file, {found} used or dropped"
    assert all(reason.strip() and number > 0 for reason, number in counts.dropped.items())
    if counts.dropped:
        total = f"{sum(counts.dropped.values())} of {num_boxes} boxes dropped"
        assert any(total in line for line in lines), f"not logged: {total}"
    assert counts.num_images == len(opened) == len(records)
    in_records = Counter(
        "crowd" if crowd else name
        for record in records
        if record is not None
        for (name, *_), crowd in zip(record.names, record.is_crowd, strict=True)
    )
    expected = Counter({**counts.boxes, "crowd": counts.num_crowd})
    if None in records:
        assert in_records <= expected, "records hold boxes that the counts do not know"
    else:
        assert +in_records == +expected, f"records {in_records}, counts {expected}"
    for record in records:
        if record is not None:
            _check_record(record, {category.name for category in opened.categories})


def _check_record(record: Any, names: set[str]) -> None:
    boxes = np.asarray(record.boxes_xyxy)
    assert boxes.dtype == np.float32 and boxes.shape == (len(record.names), 4)
    assert len(record.is_crowd) == len(record.scores) == len(boxes)
    assert np.isfinite(boxes).all() and (boxes >= 0).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all(), "a box without area"
    positive = {name for of_box in record.names for name in of_box}
    assert positive <= names and not positive & set(record.negatives)


def _place(error: BaseException) -> str:
    """Where our code, or else the test's, raised or passed on an error."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/owl_det/" in f.filename or "/data_pipelines/" in f.filename]
    ours = [f for f in ours if "/tests/" not in f.filename and "site-packages" not in f.filename]
    frame = (ours or [*frames])[-1]
    text = " ".join(str(error).split())[:100]
    return f"{Path(frame.filename).name}:{frame.lineno} {frame.name} ({text})"


def _report(failures: dict[str, list[int]], count: int, make: Callable[..., Case]) -> str:
    total = sum(map(len, failures.values()))
    ranked = sorted(failures.items(), key=lambda item: -len(item[1]))
    lines = [
        f"{len(seeds):5d} x {kind}; {make.__module__}._reproduce({seeds[0]})"
        + (f", {', '.join(map(str, seeds[1:4]))}" if len(seeds) > 1 else "")
        for kind, seeds in ranked[:_SHOWN]
    ]
    more = [f"… and {len(ranked) - _SHOWN} kinds more"] if len(ranked) > _SHOWN else []
    return "\n".join([f"{total} of {count} inputs, {len(ranked)} kinds:", *lines, *more])


# --- what is watched -----------------------------------------------------------------------------


class _Watch:
    """The folder that may be written to while a reader runs; None = nothing is watched."""

    folder: str | None = None
    seen: list[str] = []


def _on_event(event: str, arguments: tuple[Any, ...]) -> None:
    if _Watch.folder is None:
        return
    if event == "open":
        path, mode, flags = arguments
        is_write = any(x in mode for x in "wax+") if isinstance(mode, str) else flags & _WRITES
        bad = bool(is_write) and not _is_inside(path)
    elif event == "exec":
        # Modules are run from their files.
        is_file = not getattr(arguments[0], "co_filename", "<").startswith("<")
        caller = sys._getframe(1).f_code.co_filename
        arguments = (*arguments, caller)
        bad = not is_file and not any(part in caller for part in _WRITES_CODE)
    elif event in _CHANGES_FILES:
        bad = not _is_inside(arguments[0])
    else:
        bad = event in _RUNS_CODE
    if bad:
        folder, _Watch.folder = _Watch.folder, None
        _Watch.seen.append(f"{event} {str(arguments)[:200]}")
        _Watch.folder = folder
        raise Forbidden(f"{event} {str(arguments)[:200]}")


def _is_inside(path: Any) -> bool:
    if isinstance(path, int) or path is None:
        return True  # a file that is open already
    return os.path.realpath(os.fsdecode(path)).startswith(f"{_Watch.folder}{os.sep}")


_is_hooked = False


@contextlib.contextmanager
def _watched(folder: Path) -> Iterator[None]:
    """Raises `Forbidden` where code is run or files outside `folder` are changed."""
    global _is_hooked
    if not _is_hooked:
        sys.addaudithook(_on_event)  # which nothing can remove
        _is_hooked = True
    _Watch.seen = []
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # of modules first used here
    _Watch.folder = os.path.realpath(folder)
    try:
        yield
    finally:
        _Watch.folder = None
        sys.dont_write_bytecode = before
    if _Watch.seen:  # it was raised in a thread, or swallowed
        raise Forbidden(_Watch.seen[0])


@contextlib.contextmanager
def _logged() -> Iterator[list[str]]:
    """The lines that are logged as warnings or worse."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("absl")
    before, logger.handlers, logger.propagate = logger.handlers, [handler], False
    try:
        yield lines
    finally:
        logger.handlers, logger.propagate = before, True


@contextlib.contextmanager
def _hurried() -> Iterator[None]:
    """Raises `TooSlow` in the main thread after `SECONDS` of CPU time."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooSlow(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _megabytes() -> float:
    """The most memory that this process had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
