"""The command line's side of the agent's control socket, blocking; and starting an agent where none runs.

One request per connection. A line of JSON there: {"verb", "volume", "options", "state_url"}; a line of JSON back:
{"code", "text", "data"}, with the exit codes of DESIGN 12. The agent answers when the verb is done.
`ping` is answered as soon as the agent can take verbs; its data names `host`, `state_url`, and `metrics`:
null where none are wanted, else `url` and `error` (null: they are served).
"""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shadowvol.agent.paths import Home

REPLY_BYTES_MAX = 64 << 20  # a status of many volumes; more than this is no agent of ours
START_LIMIT_S = 15.0  # an agent that has not answered by then is not coming
START_POLL_S = 0.02
PING_LIMIT_S = 5.0
AGENT_LOCK_HELD_EXIT = 3  # an agent's exit code when another one holds agent.lock
_LOG_TAIL_BYTES = 8192


class AgentNotRunning(Exception):
    """Nobody serves the control socket of this home."""


class AgentFailed(Exception):
    """The agent went away, did not answer in time (`timed_out`), or could not be started."""

    def __init__(self, text: str, *, timed_out: bool = False) -> None:
        super().__init__(text)
        self.timed_out = timed_out


@dataclass(frozen=True, slots=True)
class Result:
    """The agent's answer. `text` is for the operator, `data` for the program."""

    code: int
    text: str
    data: Any = None


def call(
    home: Home,
    verb: str,
    volume: str | None = None,
    options: dict[str, Any] | None = None,
    timeout_s: float | None = None,
    *,
    state_url: str | None = None,
) -> Result:
    """Have the agent do a verb; returns when it is done. With `state_url` it refuses if it works on another record.

    Raises AgentNotRunning, AgentFailed.
    """
    deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
    content = {"verb": verb, "volume": volume, "options": options or {}, "state_url": state_url}
    request = json.dumps(content).encode() + b"\n"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.settimeout(timeout_s)
            connection.connect(str(home.agent_socket))
        except (FileNotFoundError, ConnectionRefusedError):
            raise AgentNotRunning(f"no agent is running for {home.directory}") from None
        except OSError as error:
            raise AgentFailed(f"the agent cannot be reached: {error.strerror or error}") from None
        try:
            connection.sendall(request)
            line = _read_line(connection, deadline_s)
        except TimeoutError:
            raise AgentFailed(f"{verb}: no answer within {timeout_s:g} s; it goes on", timed_out=True) from None
        except OSError as error:
            raise AgentFailed(f"the agent went away during {verb}: {error.strerror}") from None
    try:
        answer = json.loads(line)
        return Result(int(answer["code"]), str(answer.get("text") or ""), answer.get("data"))
    except (ValueError, TypeError, KeyError, AttributeError):
        raise AgentFailed(f"the agent went away during {verb}; see shadowvol status") from None


def _read_line(connection: socket.socket, deadline_s: float | None) -> bytes:
    """Up to the first newline, or to the end of the connection."""
    received = bytearray()
    while not received.endswith(b"\n") and len(received) < REPLY_BYTES_MAX:
        if deadline_s is not None:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError
            connection.settimeout(left_s)
        piece = connection.recv(1 << 16)
        if not piece:
            break
        received += piece
    return bytes(received)


def ping(home: Home) -> Result | None:
    """The agent's answer, or None where none answers."""
    try:
        return call(home, "ping", timeout_s=PING_LIMIT_S)
    except (AgentNotRunning, AgentFailed):
        return None


def ensure_agent(home: Home, state_url: str, host: str) -> bool:
    """Start an agent unless one answers; returns when it takes verbs, True if this call started one.

    The agent outlives this process and its terminal. Several callers at once are fine: one agent wins agent.lock.
    Raises AgentFailed with the agent's last words.
    """
    if (answer := ping(home)) is not None:
        _check_same(answer, state_url, home)
        return False
    process = _start(home, state_url, host)
    deadline_s = time.monotonic() + START_LIMIT_S
    while True:
        code = process.poll()
        if (answer := ping(home)) is not None:
            _check_same(answer, state_url, home)
            if code is None:
                process.returncode = 0  # it lives on, and is not waited for
            return code is None
        if code not in (None, AGENT_LOCK_HELD_EXIT):
            raise AgentFailed(f"the agent ended while starting ({_how(code)}): {_last_words(home.agent_log)}")
        if time.monotonic() > deadline_s:
            if code is None:
                process.returncode = 0
            raise AgentFailed(f"the agent does not answer within {START_LIMIT_S:g} s; its log is {home.agent_log}")
        time.sleep(START_POLL_S)


def _start(home: Home, state_url: str, host: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "shadowvol.agent"]
    options = ["--home", str(home.directory), "--state", state_url, "--host", host]
    try:
        log = os.open(home.agent_log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise AgentFailed(f"{home.agent_log}: {error.strerror}") from None
    try:
        return subprocess.Popen(
            command + options, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", start_new_session=True
        )
    finally:
        os.close(log)


def _check_same(answer: Result, state_url: str, home: Home) -> None:
    theirs = answer.data.get("state_url") if isinstance(answer.data, dict) else None
    if theirs not in (None, state_url):
        raise AgentFailed(f"the agent of {home.directory} works on the state {theirs}, not on {state_url}")


def _how(code: int | None) -> str:
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"


def _last_words(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _LOG_TAIL_BYTES))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    return lines[-1].removeprefix("shadowvol: ") if lines else f"its log {log} is empty"
