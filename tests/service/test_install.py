"""scripts/install-service, as an operator runs it, into a folder of the test's own; the real place is read only."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.endings import AS_NOBODY

INSTALL = Path(__file__).resolve().parents[2] / "scripts" / "install-service"
NAMES = ["shadowvol-unmount.service", "shadowvol.service"]
LIMIT_S = 60


def install(*options: str | Path, code: int = 0, nobody: bool = False) -> "subprocess.CompletedProcess[str]":
    command = [*(AS_NOBODY if nobody else ()), str(INSTALL), *map(str, options)]
    environment = dict(os.environ, SHADOWVOL_HOME="/from/one/shell")  # a service is not for one shell
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == code and "Traceback" not in done.stderr, done
    return done


def there(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_dry_run_shows_all_of_it_and_changes_nothing(tmp_path: Path) -> None:
    shown = install("--dry-run", "--unit-directory", tmp_path, "--home", "/srv/sv").stdout
    assert there(tmp_path) == []
    install("--unit-directory", tmp_path, "--home", "/srv/sv")
    assert there(tmp_path) == NAMES
    for name in NAMES:
        text = (tmp_path / name).read_text()
        assert f"would write: {tmp_path / name}\n{text}" in shown
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o644


def test_the_home_is_that_of_the_host_not_of_one_shell(tmp_path: Path) -> None:
    install("--unit-directory", tmp_path)
    text = (tmp_path / "shadowvol.service").read_text()
    assert "RequiresMountsFor=/var/lib/shadowvol\n" in text and "@" not in text.replace("open-iscsi@", "")
    assert f"ExecStart={INSTALL.parents[1]}/.venv/bin/shadowvol --home /var/lib/shadowvol agent\n" in text


def test_installing_again_replaces_what_is_old_and_removing_takes_only_ours(tmp_path: Path) -> None:
    (tmp_path / "other.service").touch()
    install("--unit-directory", tmp_path)
    (tmp_path / "shadowvol.service").write_text("old")
    again = install("--unit-directory", tmp_path).stdout
    assert f"written: {tmp_path}/shadowvol.service" in again
    assert f"unchanged: {tmp_path}/shadowvol-unmount.service" in again
    assert "next: systemctl enable --now shadowvol.service" in again
    install("--unit-directory", tmp_path, "--remove", "--dry-run")
    assert there(tmp_path) == ["other.service", *NAMES]
    for _ in range(2):
        install("--unit-directory", tmp_path, "--remove")
        assert there(tmp_path) == ["other.service"]


@pytest.mark.parametrize(
    ("home", "words"),
    [
        ("/srv/a b", "cannot be written into a unit"),
        ("/srv/100%", "cannot be written into a unit"),
        ("/" + "x" * 120, "choose a shorter --home"),
        ("", "--home is empty"),
        (__file__, "not a directory"),
    ],
)
def test_a_home_that_no_service_can_have_is_refused(tmp_path: Path, home: str, words: str) -> None:
    assert words in install("--unit-directory", tmp_path, "--home", home, code=2).stderr
    assert there(tmp_path) == []


def test_bad_usage_and_no_permission() -> None:
    install("--no-such-option", code=2)
    refused = install("--unit-directory", "/etc/systemd/system", code=1, nobody=True).stderr
    assert refused.startswith("install-service: /etc/systemd/system cannot be written; units are installed by root.")
