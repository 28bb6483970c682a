"""fio verifies its own writes while every region is copied through windows, and reads move to the target and back."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from shadowvol.core.geometry import BLOCK_BYTES, MIB, Run
from shadowvol.core.messages import Close, Flush, Freeze, HoldBlocks, Open, ReleaseBlocks, SetState, Thaw, Touched
from tests.support.leader_stub import LeaderStub
from tests.support.load import VERIFIED
from tests.support.nbd_member import leg_record, nbd_member, sparse_file

SIZE = 32 * MIB
WINDOW_REGIONS = 8
FIO_S = 5
HOLD_TRIES = 20


def copy(source: Path, target: Path, extents: list[Run], unit: int, meanwhile: Callable[[], object] = bool) -> None:
    """All is read before anything is written, so that what is written is old where the load has been faster."""
    with source.open("rb", buffering=0) as reader, target.open("r+b", buffering=0) as writer:
        pieces = [os.pread(reader.fileno(), (hi - lo) * unit, lo * unit) for lo, hi in extents]
        meanwhile()
        for (lo, _), piece in zip(extents, pieces, strict=True):
            os.pwrite(writer.fileno(), piece, lo * unit)


def copy_window(leader: LeaderStub, number: int, runs: list[Run], source: Path, target: Path) -> None:
    """Steps 2 to 8 of DESIGN 7."""

    def ask(body: object) -> list[Run]:
        answer = leader.request(f"w{number}", body)
        return [(lo, hi) for lo, hi in answer["blocks"]]

    leader.request(f"w{number}", Open(number, runs, 0, 1))
    copy(source, target, runs, MIB, leader.latest_stats)
    copy(source, target, ask(Touched(number)), BLOCK_BYTES)
    blocks = ask(Close(number))
    for _ in range(HOLD_TRIES):
        leader.request(f"w{number}", HoldBlocks(number, blocks))
        copy(source, target, blocks, BLOCK_BYTES)
        if leader.request(f"w{number}", ReleaseBlocks(number)) == {"unbroken": True}:
            break
    else:
        raise AssertionError("no hold was ever unbroken")
    assert leader.request(f"w{number}", Flush(number)) == {"failed": []}
    leader.map.set_ok(1, runs)
    assert leader.request("x", SetState(changes=((1, True, runs),), close=(number,))) == {}


def switch(leader: LeaderStub, preferred: int) -> None:
    assert leader.request("x", Freeze(None, False, True)) == {"faults": []}
    assert leader.request("x", SetState(preferred=preferred)) == {}
    assert leader.request("x", Thaw()) == {}


@pytest.mark.parametrize("data_path", ["python", "filter", "disturbed"], indirect=True)
def test_copy_cutover_and_undo_under_a_verifying_load(tmp_path: Path) -> None:
    source, target = sparse_file(tmp_path / "source", SIZE), sparse_file(tmp_path / "target", SIZE)
    with nbd_member(tmp_path, leg_record(source), leg_record(target), size_bytes=SIZE, phase="copying") as member:
        load = ["--ioengine=nbd", f"--uri={member.uri}", *VERIFIED, "--bsrange=512-96k", "--verify_state_save=0"]
        length = [f"--size={SIZE}", "--time_based", f"--runtime={FIO_S}", f"--aux-path={tmp_path}"]
        command = ["fio", "--name=load", *load, *length]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as fio:
            for number, first in enumerate(range(0, SIZE // MIB, WINDOW_REGIONS), 1):
                copy_window(member.leader, number, [(first, first + WINDOW_REGIONS)], source, target)
            switches = 0
            while fio.poll() is None:
                switch(member.leader, switches % 2)
                switches += 1
            output = fio.communicate()[0]
        assert fio.returncode == 0, output
        assert switches > 3
        assert source.read_bytes() == target.read_bytes()
        assert any(source.read_bytes()), "fio wrote"
        longest_s = max(stats["hold_longest_s"] for stats in member.leader.stats)
        assert longest_s < 2, "a hold is short"
