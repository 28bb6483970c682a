"""Completion as a person meets it: a shell on a terminal that sourced what `shadowvol completion` prints, and Tab."""

import os
import pty
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shadowvol.cli.completion import VARIABLE
from tests.cli.conftest import COMMAND, Shell
from tests.support.poll import wait_for

Leg = Callable[..., Path]
START = {
    "bash": ("bash --norc -i", "bind 'set enable-bracketed-paste off' 'set bell-style none'"),
    "zsh": ("zsh -f -i", "autoload -Uz compinit && compinit -D -u; unsetopt zle_bracketed_paste; PS1='> '"),
}
LIMIT_S = 20.0


class Terminal:
    """A shell that reads keys and echoes what a person would see."""

    def __init__(self, shell: str, shadowvol: Shell) -> None:
        command, settings = START[shell]
        self._seen = ""
        clean = {key: value for key, value in os.environ.items() if not key.startswith("SHADOWVOL_")}
        clean |= {"SHADOWVOL_HOME": str(shadowvol.home), "TERM": "dumb", "HOME": str(shadowvol.folder)}
        clean["PATH"] = f"{Path(COMMAND).parent}:{clean['PATH']}"
        self._keys, theirs = pty.openpty()
        self._process = subprocess.Popen(
            command.split(),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=clean,
            cwd=shadowvol.folder,
            start_new_session=True,
        )
        os.close(theirs)
        os.set_blocking(self._keys, False)
        self.types(f'{settings}; eval "$(shadowvol completion {shell})"; echo rea""dy\n')
        self.waits_for("ready")

    def types(self, keys: str) -> None:
        self._seen = ""
        os.write(self._keys, keys.encode())

    def waits_for(self, text: str) -> str:
        """What the terminal shows since the last keys, once `text` is in it."""
        wait_for(lambda: text in self._read(), LIMIT_S, f"the terminal shows {text!r}")
        return self._seen

    def _read(self) -> str:
        try:
            self._seen += os.read(self._keys, 1 << 16).decode(errors="replace")
        except BlockingIOError:
            pass
        return self._seen

    def end(self) -> None:
        self._process.kill()
        self._process.wait(LIMIT_S)
        os.close(self._keys)


@contextmanager
def terminal(shell: str, shadowvol: Shell) -> Iterator[Terminal]:
    opened = Terminal(shell, shadowvol)
    try:
        yield opened
    finally:
        opened.end()


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_tab_completes_verbs_options_phases_volumes_and_paths(shell: str, shadowvol: Shell, leg: Leg) -> None:
    """No agent is needed for it, and nothing but what was completed appears."""
    shadowvol.good("create", "mail", "--source", leg("old.img"), "--target", leg("new.img"))
    cases = (
        ("shadowvol cutov\t", "cutover "),
        ("shadowvol commit --keep\t", "--keep-undo "),
        ("shadowvol wait mail --for comm\t", "committed "),
        ("shadowvol delete ma\t", "mail "),
        ("shadowvol up ma\t", "mail "),
        (f"shadowvol --home {shadowvol.home} status m\t", "mail "),
        ("shadowvol retarget mail --target new\t", "new.img "),
    )
    with terminal(shell, shadowvol) as shown:
        for keys, completed in cases:
            shown.types(keys)
            seen = shown.waits_for(completed)
            assert "shadowvol:" not in seen and "Traceback" not in seen, seen
            shown.types("\x15")  # away with the line


def complete(shadowvol: Shell, *words: str, home: Path | None = None) -> list[str]:
    """What the shell's side is told for the last of `words`; nothing goes to the terminal besides."""
    asked = {VARIABLE: "bash_complete", "COMP_WORDS": "\n".join(("shadowvol", *words)), "COMP_CWORD": str(len(words))}
    ended = shadowvol(environment=asked | ({"SHADOWVOL_HOME": str(home)} if home else {}))
    assert (ended.code, ended.err) == (0, ""), ended
    return [line.partition(",")[2] for line in ended.out.splitlines() if line]


def test_names_are_those_of_this_home_that_begin_so_and_are_not_there_yet(shadowvol: Shell, leg: Leg) -> None:
    for name in ("mail", "main", "web"):
        shadowvol.good("create", name, "--source", leg(f"{name}.old"), "--target", leg(f"{name}.new"))
    assert complete(shadowvol, "up", "") == ["mail", "main", "web"]
    assert complete(shadowvol, "up", "mail", "ma") == ["main"]
    assert complete(shadowvol, "wait", "w") == ["web"]
    assert complete(shadowvol, "create", "") == []
    assert complete(shadowvol, "--home", str(shadowvol.folder / "other"), "up", "") == []


def test_completion_that_finds_nothing_says_nothing_and_makes_nothing(shadowvol: Shell, leg: Leg) -> None:
    """No home, a home that is a file, a damaged record, a line that no verb would take."""
    assert complete(shadowvol, "up", "") == []
    assert not shadowvol.home.exists()
    assert complete(shadowvol, "up", "", home=leg("file")) == []
    shadowvol.home.mkdir()
    (shadowvol.home / "state.sqlite").write_bytes(b"no database" * 100)
    assert complete(shadowvol, "up", "") == []
    assert complete(shadowvol, "create", "v", "--source", "a", "--source", "b", "--prov") == ["--provision"]
    assert complete(shadowvol, "nonsense", "--what", "x") == []


def test_completion_knows_two_shells(shadowvol: Shell) -> None:
    shadowvol("completion", "fish").refused(2, "fish", "bash", "zsh")
