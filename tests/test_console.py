"""What all commands do around their work, in real processes where a terminal matters."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from owl_det import console
from owl_det.errors import DataError, ExitCode


def _raise(error: BaseException) -> int:
    raise error


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DataError("a.json:\n  is   empty"), ExitCode.REFUSED, "tool: a.json: is empty\n"),
        (OSError(28, "No space left on device", "x"), ExitCode.REFUSED, "No space left on device"),
        (KeyboardInterrupt(), ExitCode.INTERRUPTED, "tool: interrupted\n"),
    ],
)
def test_an_error_is_one_line_and_a_code(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert console.run("tool", lambda: _raise(error)) == code
    shown = capsys.readouterr().err
    assert line in shown and shown.count("\n") == 1


def test_what_is_no_users_error_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        console.run("tool", lambda: 1 // 0)


def _python(code: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONWARNINGS": ""},
    )


def test_a_closed_pipe_is_no_error() -> None:
    code = (
        "import sys\nfrom owl_det import console\n"
        "def work():\n    for i in range(10**6): print('line', i)\n    return 0\n"
        "sys.exit(console.run('tool', work))"
    )
    with _python(code) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "line 0\n"
        process.stdout.close()  # as `| head -1` does
        assert process.stderr.read() == ""
        assert process.wait() == ExitCode.DONE


@pytest.mark.parametrize(
    ("number", "line", "code"),
    [
        (signal.SIGINT, "tool: interrupted\n", ExitCode.INTERRUPTED),
        (signal.SIGTERM, "tool: stopped by SIGTERM before the end\n", ExitCode.UNFINISHED),
    ],
)
def test_a_signal_is_one_line_and_files_are_tidied_up(
    number: signal.Signals, line: str, code: ExitCode
) -> None:
    program = (
        "import sys, time\nfrom owl_det import console\n"
        "def work():\n"
        "    try: print('works', flush=True); time.sleep(60)\n"
        "    finally: print('tidied')\n    return 0\n"
        "sys.exit(console.run('tool', work))"
    )
    with _python(program) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "works\n"
        process.send_signal(number)
        assert process.stderr.read() == line
        assert process.stdout.read() == "tidied\n"
        assert process.wait() == code


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_a_callback_drops_is_raised_again(number: signal.Signals) -> None:
    program = (
        "import gc, signal, sys, time\nfrom owl_det import console\n"
        f"def collected(*_): gc.callbacks.clear(); signal.raise_signal({int(number)})\n"
        "def work():\n    gc.callbacks.append(collected); gc.collect()\n"
        "    for _ in range(600): time.sleep(0.1)  # which no real signal breaks off\n"
        "    return 0\n"
        "sys.exit(console.run('tool', work))"
    )
    with _python(program) as process:
        assert "Traceback" not in process.communicate(timeout=30)[1]
    expected = {signal.SIGINT: ExitCode.INTERRUPTED, signal.SIGTERM: ExitCode.UNFINISHED}
    assert process.returncode == expected[number]


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert console.run("tool", lambda: 0) == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_what_a_signal_raises_is_not_printed_where_python_or_compiled_code_drops_it() -> None:
    code = (
        "import ctypes, gc, signal\n"
        "from owl_det import console\nfrom owl_det.stop_signal import Stopped, StopSignal\n"
        "def collected(*_): signal.raise_signal(signal.SIGTERM)\n"
        "def raised(): raise Stopped\n"
        "def work():\n"
        "    with StopSignal() as stop:\n"
        "        gc.callbacks.append(collected); gc.collect(); gc.callbacks.clear()\n"
        "        ctypes.CFUNCTYPE(None)(raised)()\n"
        "        try: raised()\n"
        "        except Stopped as error: sys.excepthook(Stopped, error, None)\n"  # PyErr_Print
        "        print(stop.is_set())\n"
        "    return 0\n"
        "import sys\nsys.exit(console.run('tool', work))"
    )
    with _python(code) as process:
        shown, problems = process.communicate()
    assert (shown, problems, process.returncode) == ("True\n", "", 0)


def test_answers_to_a_loop_that_a_failed_save_closed_are_not_printed() -> None:
    """TensorStore's threads go on after an error such as a full disk, and print what they meet."""
    program = (
        "import asyncio, ctypes, sys, threading\nfrom owl_det import console\n"
        "def answer():\n"
        "    loop = asyncio.new_event_loop(); loop.close()\n"
        "    for call in (lambda: loop.call_soon_threadsafe(print), lambda: 1 // 0):\n"
        "        ctypes.CFUNCTYPE(None)(call)()\n"  # PyErr_WriteUnraisable
        "        try: call()\n"
        "        except Exception as error: sys.excepthook(type(error), error, None)\n"
        "def work():\n"
        "    thread = threading.Thread(target=answer); thread.start(); thread.join(); return 0\n"
        "sys.exit(console.run('tool', work))"
    )
    with _python(program) as process:
        problems = process.communicate()[1]
    assert "Event loop is closed" not in problems and problems.count("ZeroDivisionError:") == 2


def test_other_errors_in_callbacks_are_still_printed() -> None:
    code = (
        "import ctypes\nfrom owl_det import console\n"
        "def work(): ctypes.CFUNCTYPE(None)(lambda: 1 / 0)(); return 0\n"
        "console.run('tool', work)"
    )
    with _python(code) as process:
        assert "ZeroDivisionError" in process.communicate()[1]


@pytest.mark.parametrize("module", ["owl_det.main", "owl_det.cli"])
def test_what_takes_long_to_import_waits_until_ctrl_c_is_one_line(module: str) -> None:
    code = f"import sys, {module}; print('numpy' in sys.modules)"
    with _python(code) as process:
        assert process.communicate()[0] == "False\n"


def test_progress_in_a_file_is_plain_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "LINE_SECONDS", 0.0)
    for _ in console.progress(range(3), unit="image", label="evaluate val"):
        pass
    shown = capsys.readouterr().err
    assert "\r" not in shown and "\x1b" not in shown
    lines = shown.splitlines()
    assert re.fullmatch(r"evaluate val: 3 of 3, [\d.e+-]+ images/s, 00:00 left", lines[-1])
    assert all(lines) and len(set(lines)) == len(lines)


def test_progress_that_is_not_shown_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(console.progress(range(3), unit="image", is_shown=False)) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_our_warnings_are_plain_and_orbax_is_quiet(tmp_path: Path) -> None:
    library = tmp_path / "orbax" / "noise.py"
    library.parent.mkdir()
    library.write_text("from absl import logging\nlogging.warning('no metadata')\n")
    code = (
        "import runpy, warnings\nfrom absl import logging\nfrom owl_det import console\n"
        "console.quiet_libraries()\n"
        "with console.plain_warnings('tool'):\n"
        "    logging.info('detail')\n    logging.warning('3 of 4 boxes')\n"
        "    warnings.warn('of a library')\n"
        f"    runpy.run_path({str(library)!r})"
    )
    with _python(code) as process:
        _, shown = process.communicate()
    assert shown == "tool: warning: 3 of 4 boxes\n"


def test_writes_that_fail_beside_another_print_nothing() -> None:
    """On a full disk many tasks of a checkpoint fail; one error is raised, and told."""
    code = (
        "import asyncio, gc\nfrom owl_det import console\nconsole.quiet_libraries()\n"
        "async def fails():\n    raise ValueError('no space left')\n"
        "async def writes():\n"
        "    tasks = [asyncio.ensure_future(fails()) for _ in range(3)]\n"
        "    await asyncio.sleep(0)\n    del tasks\n    gc.collect()\n"
        "asyncio.run(writes())\nprint('done')"
    )
    with _python(code) as process:
        printed, shown = process.communicate()
    assert (printed, shown) == ("done\n", "")
