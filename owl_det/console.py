"""What every command does around its work: quiet libraries, exit codes, progress bars."""

import _thread
import logging as std_logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any, NoReturn

from absl import logging
from tqdm import tqdm

from owl_det.errors import ExitCode, UserError
from owl_det.stop_signal import Stopped

LINE_SECONDS = 30.0  # between progress lines where stderr is a file
_LINE = "{desc}: {n_fmt} of {total_fmt}, {speed}, {remaining} left{postfix}"


class _Terminated(KeyboardInterrupt):
    """SIGTERM; on its way it is what Ctrl-C is, so that the same files are tidied up."""


def run(name: str, command: Callable[[], int]) -> int:
    """Runs a command and returns its exit code (`errors.ExitCode`).

    A user's error is one line on stderr that starts with `name`; so are Ctrl-C and SIGTERM.
    """
    try:
        with _insistent_interrupt():
            code = command()
        sys.stdout.flush()  # here, where a closed pipe can still be met
        return code
    except BrokenPipeError:  # of `| head`: who reads has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.DONE
    except (Exception, KeyboardInterrupt) as error:
        interrupt = _interrupt(error)
        if isinstance(interrupt, _Terminated):
            print(f"{name}: stopped by SIGTERM before the end", file=sys.stderr)
            return ExitCode.UNFINISHED
        if interrupt is not None:
            print(f"{name}: interrupted", file=sys.stderr)
            return ExitCode.INTERRUPTED
        if not isinstance(error, (UserError, OSError)):
            raise
        fail(name, error)
        return ExitCode.REFUSED


def _interrupt(error: BaseException | None) -> KeyboardInterrupt | None:
    """Ctrl-C or SIGTERM itself, or behind what compiled code made of it."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error


@contextmanager
def _insistent_interrupt() -> Generator[None, None, None]:
    """Ctrl-C is not lost where Python drops it: in callbacks, as JAX has at garbage collection.

    Nor in asyncio, which puts a handler of its own in the place of Python's while Orbax reads. And
    SIGTERM goes the same way. Handlers that are set already stay.
    """
    handlers = {
        signal.SIGINT: (signal.default_int_handler, signal.default_int_handler),
        signal.SIGTERM: (signal.SIG_DFL, _terminate),
    }
    ours: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number, (default, handler) in handlers.items():
            if signal.getsignal(number) is default:
                ours[number] = default
                signal.signal(number, lambda *given, handler=handler: handler(*given))
    before = sys.unraisablehook, sys.excepthook

    def again(dropped: Any) -> None:
        if _is_of_no_interest(dropped.exc_type, dropped.exc_value):
            return
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            before[0](dropped)
            return
        number = signal.SIGTERM if dropped.exc_type is _Terminated else signal.SIGINT
        timer = threading.Timer(0.05, _thread.interrupt_main, (number,))  # once it is left
        timer.daemon = True
        timer.start()

    def printed(kind: type[BaseException], error: BaseException, *rest: Any) -> None:
        # By compiled code, which goes on.
        if not issubclass(kind, KeyboardInterrupt) and not _is_of_no_interest(kind, error):
            before[1](kind, error, *rest)

    sys.unraisablehook, sys.excepthook = again, printed
    try:
        yield
    finally:
        sys.unraisablehook, sys.excepthook = before
        for number, default in ours.items():
            signal.signal(number, default)


def _is_of_no_interest(kind: type[BaseException], error: BaseException | None) -> bool:
    """True for errors that nobody catches, and that say nothing which is not said elsewhere.

    What was told to stop asks again by itself. Threads that write a checkpoint answer to a loop
    that was closed when another of them failed, as on a full disk.
    """
    is_late = kind is RuntimeError and str(error) == "Event loop is closed"
    return is_late or issubclass(kind, Stopped)


def _terminate(*_: object) -> NoReturn:
    raise _Terminated


def leave(code: int) -> NoReturn:
    """Ends the process now: XLA's threads may crash in the tidying up after an interrupt."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def fail(name: str, error: Exception) -> None:
    """Prints an error as one line."""
    print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


def quiet_libraries() -> None:
    """Keeps lines of other libraries that do not concern the user off the terminal.

    To be called before TensorFlow or JAX is imported. What a user has set in the environment stays.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # CUDA that is not there
    # TensorFlow tells of oneDNN at every import, whatever the level; it only moves data here.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    std_logging.getLogger("jax._src.xla_bridge").setLevel(std_logging.WARNING)  # "no libtpu.so"
    std_logging.getLogger("asyncio").addFilter(_is_told_here_alone)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # Python's warnings are for those who write the code
    logging.get_absl_logger().addFilter(_is_of_interest)


def _is_told_here_alone(record: std_logging.LogRecord) -> bool:
    """False for tasks that failed beside another: Orbax raises the first failed write of many."""
    return not record.getMessage().startswith("Task exception was never retrieved")


@contextmanager
def plain_warnings(name: str) -> Generator[None, None, None]:
    """In this block warnings of this package are `name: warning: …` on stderr, and no more."""
    logger, verbosity = logging.get_absl_logger(), logging.get_verbosity()
    before, level = (logger.handlers, logger.propagate), logger.level
    logging.set_verbosity(logging.WARNING)
    logger.handlers, logger.propagate = [_PlainLines(name)], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before
        logging.set_verbosity(verbosity)  # which sets a level where there was none
        logger.setLevel(level)


class _PlainLines(std_logging.Handler):
    """absl's own handler wants flags that were parsed by absl."""

    def __init__(self, name: str):
        super().__init__()
        self._name = name

    def emit(self, record: std_logging.LogRecord) -> None:
        line = f"{self._name}: {record.levelname.lower()}: {record.getMessage()}"
        print(line, file=sys.stderr, flush=True)


@contextmanager
def timed_lines() -> Generator[None, None, None]:
    """In this block what is logged is `15:04:05 …` on stderr, warnings as such.

    After an error nothing is logged any more: threads may still tell what they skip, and the error
    shall be the last line.
    """
    logger = logging.get_absl_logger()
    before = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [_TimedLines()], False
    try:
        yield
    except BaseException:
        logging.set_verbosity(logging.FATAL)
        raise
    finally:
        logger.handlers, logger.propagate = before


class _TimedLines(std_logging.Handler):
    def emit(self, record: std_logging.LogRecord) -> None:
        time = std_logging.Formatter().formatTime(record, "%H:%M:%S")
        level = "" if record.levelno <= std_logging.INFO else f"{record.levelname.lower()}: "
        print(f"{time} {level}{record.getMessage()}", file=sys.stderr, flush=True)


def _is_of_interest(record: std_logging.LogRecord) -> bool:
    """Orbax tells every step of a save and restore, and errors that it raises too."""
    return record.levelno > std_logging.ERROR or "/orbax/" not in record.pathname


def progress(
    items: Iterable[Any] | None = None,
    *,
    unit: str,
    total: int | None = None,
    label: str = "",
    initial: int = 0,
    leave: bool = True,
    is_shown: bool = True,
) -> Any:
    """A bar with rate and time left on a terminal; elsewhere a plain line now and then."""
    is_terminal = sys.stderr.isatty()
    kind: type[tqdm] = tqdm if is_terminal else _LineProgress
    return kind(
        items,
        total=total,
        desc=label or None,
        unit=unit,
        initial=initial,
        leave=leave,
        disable=not is_shown,
        mininterval=1.0 if is_terminal else LINE_SECONDS,
        **({} if is_terminal else {"maxinterval": LINE_SECONDS, "miniters": 1}),
    )


class _LineProgress(tqdm):
    """Lines instead of a bar that is drawn over itself: for log files."""

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        del msg, pos
        values = self.format_dict
        if not values["n"] or values["n"] == values["initial"]:
            return True
        # "0.76 steps/s": the library would turn slow rates over, and joins number and unit.
        rate = values["rate"] or (values["n"] - values["initial"]) / max(values["elapsed"], 1e-9)
        speed = f"{rate:.3g} {values['unit']}s/s"
        text = tqdm.format_meter(**{**values, "bar_format": _LINE.replace("{speed}", speed)})
        print(text.removeprefix(": "), file=sys.stderr, flush=True)
        return True

    def clear(self, *_: Any, **__: Any) -> None:
        """There is nothing to wipe out."""

    def moveto(self, n: int) -> None:
        """Lines stay where they are."""

    def close(self) -> None:
        """Prints the last state once."""
        if getattr(self, "disable", True):  # or interrupted before it was made
            return
        if self.last_print_n < self.n:
            self.display()
        self.leave = True
        self.disable = True
        type(self)._decr_instances(self)  # pyright: ignore[reportAttributeAccessIssue]
