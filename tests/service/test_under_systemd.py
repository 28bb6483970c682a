"""The delivered units under a real systemd (tests/support/servicemanager.py): restart, crash, shutdown."""

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import servicemanager
from tests.support.attached import check_file_system, make_file_system, remove_remains
from tests.support.foreground import foreground_agent
from tests.support.poll import wait_for
from tests.support.product import MIB, Product, Volume, make_source
from tests.support.servicemanager import ServiceManager, service_manager

INSTALL = Path(__file__).resolve().parents[2] / "scripts" / "install-service"
AGENT, UNMOUNT = "shadowvol.service", "shadowvol-unmount.service"
LIMIT_S = 60.0

pytestmark = pytest.mark.skipif(servicemanager.why_not() is not None, reason=str(servicemanager.why_not()))


@pytest.fixture
def product(tmp_path: Path) -> Iterator[Product]:
    product = Product(tmp_path / "h")
    yield product
    remove_remains(product)
    servicemanager.remove_cgroups()


@pytest.fixture
def manager(product: Product, tmp_path: Path) -> Iterator[ServiceManager]:
    """With the units installed as an operator does, and the agent started."""
    product.home.mkdir()
    with service_manager(tmp_path, {}) as manager:
        command = [str(INSTALL), "--home", str(product.home), "--unit-directory", str(manager.units)]
        subprocess.run(command, check=True, capture_output=True, timeout=LIMIT_S)
        manager.systemctl("daemon-reload")
        manager.systemctl("start", AGENT)
        yield manager
        product.end()


@pytest.fixture
def volume(product: Product, manager: ServiceManager, tmp_path: Path) -> Volume:
    return Volume.make(product, make_source(tmp_path / "source", 32 * MIB, 0), tmp_path / "target")


@pytest.fixture
def device(volume: Volume, manager: ServiceManager) -> Iterator[str]:
    """Attached, with a file system. Its loop device is let go here: only inside can one see whose file it lies on."""
    device = volume.run("attach").strip()
    make_file_system(device)
    yield device
    volume.product.end()
    subprocess.run(["losetup", "--detach", device], check=True)


def alive(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


def test_a_restart_and_a_crash_replace_the_agent_alone(volume: Volume, manager: ServiceManager) -> None:
    """The service is ready when `systemctl` returns, and the member that lived on is known to the new agent."""
    agent, member = volume.product.pid("v", "agent"), volume.product.pid("v", "member")
    assert manager.value(AGENT, "MainPID") == str(agent)
    assert manager.value(AGENT, "StatusText") == f"0 volumes up, home {volume.product.home}"
    manager.systemctl("restart", AGENT)
    restarted = volume.product.pid("v", "agent")
    assert restarted != agent and volume.product.pid("v", "member") == member
    assert manager.value(AGENT, "StatusText") == f"1 volumes up, home {volume.product.home}"
    os.kill(restarted, signal.SIGKILL)
    wait_for(lambda: manager.value(AGENT, "NRestarts") == "1", LIMIT_S, "systemd has started it again")
    wait_for(lambda: manager.value(AGENT, "ActiveState") == "active", LIMIT_S, "it is ready")
    assert volume.product.pid("v", "agent") not in (agent, restarted)
    assert volume.product.pid("v", "member") == member


def test_stopped_means_the_agent_only(volume: Volume, manager: ServiceManager) -> None:
    member = volume.product.pid("v", "member")
    manager.systemctl("stop", AGENT)
    assert manager.value(AGENT, "Result") == "success"
    assert volume.product.status("v")["processes"]["agent"] is None
    assert subprocess.run(["nbdinfo", "--size", f"{volume.product.home}/run/v.sock"], check=False).returncode != 0
    assert alive(member)


def test_settings_that_cannot_be_used_are_not_tried_again(product: Product, manager: ServiceManager) -> None:
    """Nothing would change by itself."""
    drop_in = manager.units / f"{AGENT}.d" / "override.conf"
    drop_in.parent.mkdir()
    drop_in.write_text("[Service]\nEnvironment=SHADOWVOL_SOCKET_GROUP=no-such-group\n")
    manager.systemctl("daemon-reload")
    assert_fails_once(manager, 2, "there is no group no-such-group")


def test_another_agent_of_this_home_is_not_waited_for(product: Product, manager: ServiceManager) -> None:
    """As one that `up` started before the service was installed; the line says how to replace it."""
    manager.systemctl("stop", AGENT)
    with foreground_agent(product) as other:
        assert_fails_once(manager, 3, f"kill {other.pid} (its volumes go on)")
    manager.systemctl("start", AGENT)


def assert_fails_once(manager: ServiceManager, code: int, words: str) -> None:
    manager.systemctl("restart", AGENT, code=1)
    assert (manager.value(AGENT, "ActiveState"), manager.value(AGENT, "NRestarts")) == ("failed", "0")
    assert manager.value(AGENT, "ExecMainStatus") == str(code)
    assert words in manager.told()


def test_at_a_shutdown_what_is_attached_is_unmounted_then_the_agent_ends_and_members_are_last(
    volume: Volume, device: str, manager: ServiceManager, tmp_path: Path
) -> None:
    """A file system that was mounted by hand, with writes that only the unmount brings to the volume; somebody still
    uses it when the shutdown begins."""
    volume.run("start")
    volume.wait_synced()
    mnt = tmp_path / "mnt"
    mnt.mkdir()
    manager.run_inside("mount", device, str(mnt))
    manager.run_inside("dd", "if=/dev/urandom", f"of={mnt}/file", "bs=1M", "count=8", "status=none")
    user = subprocess.Popen(
        ["nsenter", f"--target={manager.pid}", "--mount", "--", "sh", "-c", f"cd {mnt} && echo there && exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with user:
        assert user.stdout is not None and user.stdout.readline() == b"there\n"
        agent, member = volume.product.pid("v", "agent"), volume.product.pid("v", "member")
        manager.shut_down()
        wait_for(lambda: manager.value(UNMOUNT, "ActiveState") == "deactivating", LIMIT_S, "it begins")
        assert alive(agent)
        user.kill()
    wait_for(lambda: not alive(agent), LIMIT_S, "the agent has ended")
    told = manager.told()
    order = [told.index(words) for words in (f"agent: umount {mnt}", "agent: agent ends (SIGTERM)")]
    assert order == sorted(order), told
    assert manager.value(UNMOUNT, "Result") == manager.value(AGENT, "Result") == "success"
    assert str(mnt) not in manager.run_inside("cat", "/proc/self/mounts")
    assert alive(member)
    volume.product.end()
    for leg in (volume.source, volume.target):
        check_file_system(leg)


def test_the_units_are_right_for_systemd_itself(tmp_path: Path) -> None:
    """`systemd-analyze verify`: no unknown setting, no cycle in the order, every command there."""
    subprocess.run([INSTALL, "--unit-directory", tmp_path], check=True, capture_output=True, timeout=LIMIT_S)
    for unit in (AGENT, UNMOUNT):
        command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / unit)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        about_ours = [line for line in done.stderr.splitlines() if re.search("shadowvol|cycle", line)]
        assert (done.returncode, about_ours) == (0, []), done.stderr
