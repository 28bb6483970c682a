"""scripts/migrate and scripts/switch as an administrator runs them: processes that write to a file or a terminal."""

import os
import pty
import signal
import subprocess
from pathlib import Path

from tests.support.poll import wait_for
from tests.support.product import Product

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
LIMIT_S = 60.0


class Script:
    """One run. With `terminal`, its three streams are one, and it has no others; losing it is a SIGHUP."""

    def __init__(self, product: Product, folder: Path, script: str, *words: str, terminal: bool = False) -> None:
        command = [str(SCRIPTS / script), "--home", str(product.home), *words]
        clean = {key: value for key, value in os.environ.items() if not key.startswith("SHADOWVOL_")}
        self._out = folder / f"{script}.out"
        self._screen: int | None = None
        self._seen = ""
        with self._out.open("wb") as out:
            if terminal:
                self._screen, theirs = pty.openpty()
                os.set_blocking(self._screen, False)
                self._process = subprocess.Popen(
                    ["setsid", "--ctty", *command], stdin=theirs, stdout=theirs, stderr=theirs, env=clean
                )
                os.close(theirs)
            else:
                self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=clean)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def output(self) -> str:
        """All so far."""
        if self._screen is None:
            return self._out.read_text()
        try:
            self._seen += os.read(self._screen, 1 << 16).decode()
        except OSError:  # nothing new; or it has ended
            pass
        return self._seen

    def wait_output(self, text: str) -> None:
        try:
            wait_for(lambda: text in self.output or self._process.poll() is not None, LIMIT_S, f"it says {text!r}")
        finally:
            assert text in self.output, f"the script has not said {text!r}:\n{self.output}"

    def types(self, text: str) -> None:
        assert self._screen is not None
        os.write(self._screen, text.encode())

    def lose_terminal(self) -> None:
        assert self._screen is not None
        os.close(self._screen)
        self._screen = None

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def ends(self, code: int, *words: str) -> str:
        """Its output, when it has ended with this code. The last line has all of `words` and never a traceback."""
        if self._screen is not None:
            wait_for(lambda: (self.output, self._process.poll() is not None)[1], LIMIT_S, "the script has ended")
        found = self._process.wait(LIMIT_S)
        output = self.output
        assert found == code, f"exit code {found}:\n{output}"
        assert "Traceback" not in output, output
        last = (output.strip().splitlines() or [""])[-1]
        for word in words:
            assert word in last, (word, output)
        return output

    def end(self) -> None:
        """For tests that fail."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(LIMIT_S)
        if self._screen is not None:
            os.close(self._screen)
            self._screen = None


def run_script(product: Product, folder: Path, script: str, *words: str) -> Script:
    """From its beginning to its end."""
    started = Script(product, folder, script, *words)
    try:
        started._process.wait(LIMIT_S)
    finally:
        started.end()
    return started
