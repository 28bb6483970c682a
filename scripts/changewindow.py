"""What scripts/migrate and scripts/switch share: the command as a subprocess, a journal, interrupts, and how they end.

Both are for a person in a change window, and use only what everybody may use: verbs, their exit codes, `status --json`.

Invariants
- A verb runs in a session of its own: Ctrl-C or a lost terminal never reaches it, so it is done or refused as a whole.
- An interrupt only sets a flag; the script looks at it between two verbs, so it always knows what it has done.
- A terminal or a log that cannot be written changes nothing about what is done.
"""

import argparse
import json
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn, TextIO

# Exit codes: 0 to 6 are those of the command (docs/shadowvol.1.md).
DONE, FAILED, BAD_INPUT, REFUSED, NO_SUCH_VOLUME, TIMED_OUT, UNREACHABLE = 0, 1, 2, 3, 4, 5, 6
INTERRUPTED, UNDONE, NOT_UNDONE = 7, 8, 9

VERB_LIMIT_S = 150.0  # the command itself gives up after 120 s and says so
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_BESIDE = Path(__file__).resolve().parent.parent / ".venv" / "bin" / "shadowvol"


class End(Exception):
    """The script ends with this exit code; `text` is the last line of the journal."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


# ---------------------------------------------------------------- the command


@dataclass(frozen=True, slots=True)
class Ended:
    """How a verb ended. `text`: what it said on standard error, else on standard output, as one line."""

    code: int
    out: str
    text: str


# With vfork, Popen's child has the default handlers before it has the session of its own: a Ctrl-C then kills the verb.
subprocess._USE_VFORK = False  # type: ignore[misc]  # a constant for type checkers; the documents say to set it


class Shadowvol:
    """The command with its global options. Each verb is a process of its own."""

    def __init__(self, options: argparse.Namespace) -> None:
        found = str(_BESIDE) if _BESIDE.exists() else shutil.which("shadowvol")
        if found is None:
            raise End(FAILED, "the command shadowvol is neither in .venv/bin beside this script nor in PATH")
        self._command = found
        given = (("--home", options.home), ("--state", options.state), ("--host", options.host))
        self._globals = [word for flag, value in given if value is not None for word in (flag, value)]

    def shown(self, *words: str) -> str:
        """The command line as a person would type it."""
        return shlex.join(["shadowvol", *self._globals, *words])

    def start(self, *words: str) -> "subprocess.Popen[str]":
        """A verb that runs on; the caller ends it."""
        return subprocess.Popen(
            [self._command, *self._globals, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )

    def run(self, *words: str, limit_s: float = VERB_LIMIT_S) -> Ended:
        """A verb from its beginning to its end. Past the limit it is not waited for any more; the agent may go on."""
        process = self.start(*words)
        try:
            out, err = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return Ended(TIMED_OUT, "", f"{words[0]} has not ended within {limit_s:.3g} s; it may go on")
        return ended(process.returncode, out, err)

    def status(self, name: str) -> dict[str, Any]:
        """Raises StatusUnknown."""
        told = self.run("status", name, "--json")
        if told.code != DONE:
            raise StatusUnknown(told)
        try:
            found: dict[str, Any] = json.loads(told.out)
        except ValueError:
            raise StatusUnknown(Ended(FAILED, "", "status printed no JSON")) from None
        return found


class StatusUnknown(Exception):
    """`status` could not tell; `told` is how it ended."""

    def __init__(self, told: Ended) -> None:
        super().__init__(told.text)
        self.told = told


def ended(code: int, out: str, err: str) -> Ended:
    """A verb that was killed by a signal counts as failed."""
    lines = [line.removeprefix("shadowvol: ").strip() for line in (err or out).splitlines() if line.strip()]
    return Ended(code if code >= 0 else FAILED, out, "; ".join(lines) or f"exit code {code}")


# ---------------------------------------------------------------- what a person reads, then or later


class Journal:
    """One line per event, with its time, on standard output and in the log; and a line that changes, on a terminal."""

    def __init__(self, script: str, name: str, log: Path | None) -> None:
        """Raises End where the log cannot be opened."""
        self._who = f"{script} {name}"
        self._terminal: TextIO | None = sys.stdout
        self.is_live = sys.stdout.isatty()
        self._moving = 0  # characters of the line that changes
        self._log: TextIO | None = None
        if log is not None:
            try:
                self._log = log.open("a", encoding="utf-8")
            except OSError as error:
                raise End(BAD_INPUT, f"--log {log}: {error.strerror}; nothing changed") from None

    def event(self, text: str) -> None:
        line = f"{_now()} {self._who}: {' '.join(text.split())}\n"
        self.print(line)
        self._write_log(line)

    def end(self, end: End) -> None:
        """The last line: on standard error where it is no success."""
        line = f"{_now()} {self._who}: {' '.join(end.text.split())} (exit code {end.code})\n"
        self.print(line if end.code == DONE else "")
        self._write_log(line)
        if end.code != DONE:
            try:
                sys.stderr.write(line)
                sys.stderr.flush()
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())

    def _write_log(self, line: str) -> None:
        if self._log is None:
            return
        try:
            self._log.write(line)
            self._log.flush()
        except OSError as error:
            self._log = None
            self.print(f"{self._who}: the log cannot be written any more: {error.strerror}\n")

    def moving(self, text: str) -> None:
        """Replaces the last one; only where a person is looking."""
        if self.is_live:
            room = shutil.get_terminal_size().columns - 1
            shown = text[:room]
            self._write("\r" + shown.ljust(self._moving))
            self._moving = len(shown)

    def clear(self) -> None:
        if self._moving:
            self._write("\r" + " " * self._moving + "\r")
            self._moving = 0

    def print(self, text: str) -> None:
        """As it is, without a time; not for the log."""
        self.clear()
        self._write(text)

    def _write(self, text: str) -> None:
        if self._terminal is None:
            return
        try:
            self._terminal.write(text)
            self._terminal.flush()
        except OSError:  # it is gone: nobody reads, and Python must not try again when it ends
            self._terminal = None
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _now() -> str:
    return datetime.now(UTC).astimezone().isoformat(timespec="seconds")


# ---------------------------------------------------------------- interrupts


class Interrupts:
    """SIGINT, SIGTERM and SIGHUP from now on only set `caught`, the name of the first. One that was ignored when the
    script began (as SIGHUP under nohup) stays ignored."""

    def __init__(self) -> None:
        self.caught: str | None = None
        self._wake, wake = os.pipe()
        os.set_blocking(wake, False)
        os.set_blocking(self._wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._catch)

    def _catch(self, number: int, frame: object) -> None:
        if self.caught is None:
            self.caught = signal.Signals(number).name

    def wait(self, seconds: float, *files: int) -> list[int]:
        """Until the time is over, an interrupt comes, or one of `files` can be read; which ones can."""
        until_s = time.monotonic() + seconds
        while self.caught is None:
            left_s = until_s - time.monotonic()
            ready, _, _ = select.select([self._wake, *files], [], [], max(0.0, left_s))
            if self._wake in ready:
                os.read(self._wake, 512)
            readable = [file for file in files if file in ready]
            if readable or left_s <= 0:
                return readable
        return []


# ---------------------------------------------------------------- the script's own command line


class Parser(argparse.ArgumentParser):
    """Bad usage is two lines on standard error and exit code 2, as with the command."""

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"{self.prog}: {message}; nothing changed\n{self.prog}: try: {self.prog} --help\n")
        raise SystemExit(BAD_INPUT)


def parser(script: str, text: str) -> Parser:
    """With what both scripts take. `text` is the script's docstring, and is its help."""
    _have_streams()
    made = Parser(
        prog=script,
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("name", metavar="NAME", help="the volume")
    for flag, metavar in (("--home", "DIR"), ("--state", "URL"), ("--host", "NAME")):
        made.add_argument(flag, metavar=metavar, type=not_empty, help="handed to the command; see shadowvol --help")
    made.add_argument("--log", metavar="FILE", type=Path, help="append each event, with its time, to FILE")
    made.add_argument("--dry-run", action="store_true", help="check, and print what would be run; change nothing")
    return made


def _have_streams() -> None:
    """A shell may have closed them (`>&-`): then Python has None there, and the next file opened gets the number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, so this one
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


def not_empty(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty")
    return text


def duration_s(text: str) -> float:
    """`90`, `30s`, `10m`, `2h`."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)\s*([a-z]*)", text.strip())
    unit = _SECONDS.get(match.group(2)) if match else None
    if match is None or unit is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration; write seconds, or 30s, 10m, 2h")
    return float(match.group(1)) * unit


def format_duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def run_script(script: str, options: argparse.Namespace, work: Callable[[Shadowvol, Journal, Interrupts], End]) -> int:
    """From the options to the exit code. What `work` returns or raises is the journal's last line."""
    interrupts = Interrupts()
    journal: Journal | None = None
    try:
        shadowvol = Shadowvol(options)
        journal = Journal(script, options.name, None if options.dry_run else options.log)
        end = work(shadowvol, journal, interrupts)
    except End as raised:
        end = raised
    if journal is not None and options.dry_run and end.code == DONE:
        journal.print(f"# {end.text}\n")  # what is printed can be pasted into a shell
    elif journal is not None:
        journal.end(end)
    elif end.code != DONE:
        sys.stderr.write(f"{script}: {end.text}\n")
    return end.code


def need_status(shadowvol: Shadowvol, name: str) -> dict[str, Any]:
    """Before anything is changed: raises End with the code of `status`."""
    try:
        return shadowvol.status(name)
    except StatusUnknown as unknown:
        raise End(unknown.told.code, f"{unknown.told.text}; nothing changed") from None
