"""What scripts/switch watches during a soak: health as `status --json` shows it, and the user's own check."""

import argparse
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

from changewindow import Interrupts

OUTPUT_SHOWN_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that should not be. `is_passing`: a restart causes it, too, so it counts after the grace only.
    `is_source`: it speaks against an undo."""

    text: str
    is_passing: bool = False
    is_source: bool = False


def findings(status: dict[str, Any], target_errors: int) -> list[Finding]:
    """`target_errors`: how many there were before."""
    found = []
    source, target = status["legs"]["source"], status["legs"]["target"]
    if target["health"] not in ("ok", None):  # None: no agent to tell, found below
        found.append(Finding(f"target is {target['health']}: {target['last_error']}"))
    if source["health"] not in ("ok", None):  # degraded while it is resynced, as after a kill of the member
        why = source["last_error"] or "it is being resynced"
        found.append(Finding(f"source is {source['health']}: {why}", is_passing=True, is_source=True))
    errors = (target["errors"] or 0) - target_errors
    if errors > 0 and target["health"] == "ok":
        found.append(Finding(f"target had {errors} error(s), the last: {target['last_error']}"))
    if status["processes"]["agent"] is None:
        found.append(Finding("no agent is running on this host", is_passing=True))
    elif status["processes"]["member"] is None or status["endpoint"] is None:
        found.append(Finding("the volume is not served: its member is away", is_passing=True))
    if status["phase"] == "copying":
        found.append(Finding("the legs are not equal any more (phase copying)", is_passing=True))
    return found


class Health:
    """Findings over time: which of them count now."""

    def __init__(self, grace_s: float, target_errors: int) -> None:
        self._grace_s = grace_s
        self._target_errors = target_errors
        self._passing_since_s: float | None = None
        self.is_troubled = False

    def judge(self, found: Sequence[Finding]) -> list[Finding]:
        """A passing one counts when there has been one at every look for the time of the grace."""
        self.is_troubled = any(finding.is_passing for finding in found)
        if not self.is_troubled:
            self._passing_since_s = None
        elif self._passing_since_s is None:
            self._passing_since_s = time.monotonic()
        lasts = self._passing_since_s is not None and time.monotonic() - self._passing_since_s >= self._grace_s
        return [finding for finding in found if lasts or not finding.is_passing]

    def findings(self, status: dict[str, Any]) -> list[Finding]:
        errors = status["legs"]["target"]["errors"]
        if errors is not None:
            self._target_errors = min(self._target_errors, errors)  # a new agent counts from zero
        return findings(status, self._target_errors)


# ---------------------------------------------------------------- the user's own check


class Check:
    """Runs a shell command again and again, without waiting for it: look() starts it when it is due, and tells."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._command: str | None = options.check
        self._every_s: float = options.check_every
        self._limit_s: float = options.check_timeout
        self._failures_max: int = options.check_failures
        self._failures = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None
        self._begun_s = 0.0
        self._due_s = time.monotonic()
        self._has_passed = False

    @property
    def is_open(self) -> bool:
        """There is no verdict yet: it has not succeeded once, is running, or has failed, but not often enough."""
        return self._command is not None and (not self._has_passed or self._failures > 0 or self._process is not None)

    def once(self, stop: Interrupts) -> str | None:
        """From its beginning to its end: why it failed. None also after an interrupt."""
        if self._command is None:
            return None
        self._start()
        while (outcome := self._outcome()) is None and stop.caught is None:
            stop.wait(0.05)
        return outcome or None

    def look(self) -> str | None:
        """Why it has failed often enough, as of now."""
        if self._command is None:
            return None
        if self._process is None:
            if time.monotonic() >= self._due_s:
                self._start()
            return None
        outcome = self._outcome()
        if outcome is None:
            return None
        self._failures = self._failures + 1 if outcome else 0
        self._has_passed = self._has_passed or not outcome
        if self._failures < self._failures_max:
            return None
        return f"{outcome} ({self._failures} times in a row)" if self._failures > 1 else outcome

    def end(self) -> None:
        """Whatever is left of it."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = None
        if self._output is not None:
            self._output.close()
            self._output = None

    def _start(self) -> None:
        self.end()
        assert self._command is not None
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 (end() closes it)
        self._begun_s = time.monotonic()
        self._due_s = self._begun_s + self._every_s
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", self._command],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
            start_new_session=True,  # so that Ctrl-C is no failure of it
        )

    def _outcome(self) -> str | None:
        """None: it is running. Empty: it succeeded. Else what is wrong."""
        assert self._process is not None and self._output is not None
        code = self._process.poll()
        if code is None and time.monotonic() - self._begun_s < self._limit_s:
            return None
        if code is None:
            outcome = f"the check has not ended within {self._limit_s:g} s"
        elif code == 0:
            outcome = ""
        else:
            self._output.seek(0)
            said = " ".join(self._output.read().decode(errors="replace").split())[-OUTPUT_SHOWN_CHARACTERS:]
            outcome = f"the check ended with {code}{f': {said}' if said else ''}"
        self.end()
        return outcome
