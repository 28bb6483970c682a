"""Each verb in each phase: what is allowed leads where it should, anything else is refused, saying what is needed.

One volume goes through all phases, once each. `refused`: words of the refusal, with exit code 3 unless another one
stands before them. `allowed`: how to get back, for a verb that leaves the phase.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import nbd
import pytest

from tests.support.endings import Keep, recorded, run
from tests.support.poll import wait_for
from tests.support.product import MIB, Product, Volume, make_source

SIZE_BYTES = 20 * MIB  # two zones
UNDER_WAY = ("the abort of volume v is under way: shadowvol wait v --for setup", "shadowvol resume v first")
WAIT_SYNCED = "wait v --for synced"

Cell = str | tuple[str, ...] | None  # words of the refusal; how to get back; None: allowed, and stays in the phase


@dataclass(frozen=True, slots=True)
class Phase:
    """`enter`: verbs that lead there from the phase before. `shown`: (phase, preferred, goal) of status."""

    name: str
    enter: tuple[str, ...]
    shown: tuple[str, str, str | None]
    refused: dict[str, str] = field(default_factory=dict)
    allowed: dict[str, tuple[str, ...]] = field(default_factory=dict)


def same(words: str, *verbs: str) -> dict[str, str]:
    return dict.fromkeys(verbs, words)


HELD = ("throttle v --rate 64KiB/s", "start v", "pause v")
GO_ON = ("throttle v --rate none", "resume v", WAIT_SYNCED)
DELETES = ("delete v", "delete v --force")
TRANSITIONS = ("start v", "cutover v", "cutover v --early", "undo v", "undo v --early", "commit v", "commit v --force")
EVERYWHERE = {"pause v": ("resume v",), "throttle v --impact low": (), "up v": (), "status v": ()}
PAUSED = {"pause v": (), "throttle v --impact low": (), "up v": (), "status v": ()}

PHASES = [
    Phase(
        "setup",
        (),
        ("setup", "source", None),
        refused={
            **same("needs phase synced", "cutover v", "cutover v --early", "commit v", "commit v --keep-undo"),
            **same("needs phase synced", "commit v --force"),
            **same("undo needs a cutover before it", "undo v", "undo v --early"),
            "abort v": "volume v is in phase setup; shadowvol start v begins",
            "delete v": "volume v is up; shadowvol down v first",
            WAIT_SYNCED: "1 it is setup; shadowvol start v leads there",
        },
        allowed={**EVERYWHERE, "resume v": (), "retarget v --target {target}": (), "down v": ("up v",)},
    ),
    Phase(
        "copying, paused",
        HELD,
        ("copying", "source", None),
        refused={
            "start v": "volume v is in phase copying; shadowvol resume v leads on",
            "cutover v": "still copying (0 of 20 regions); wait, or use --early",
            **same("already reads from the source; nothing to undo", "undo v", "undo v --early"),
            **same("shadowvol cutover v first", "commit v", "commit v --keep-undo", "commit v --force"),
            **same("volume v is in phase copying; shadowvol abort v first", *DELETES, "retarget v --target {target}"),
            WAIT_SYNCED: "1 copying is paused; shadowvol resume v",
        },
        allowed={**PAUSED, "cutover v --early": ("undo v",), "abort v": HELD, "down v": ("up v",)},
    ),
    Phase(
        "copying, reads from the target",
        ("cutover v --early",),
        ("copying", "target", None),
        refused={
            "start v": "volume v is in phase copying; shadowvol resume v leads on",
            **same("shadowvol undo v switches back", "cutover v", "cutover v --early"),
            **same("commit needs the target complete", "commit v", "commit v --keep-undo", "commit v --force"),
            **same("shadowvol abort v or shadowvol commit v first", *DELETES, "retarget v --target {target}"),
        },
        allowed={**PAUSED, "undo v --early": ("cutover v --early",)},
    ),
    Phase(
        "synced",
        ("undo v", *GO_ON),
        ("synced", "source", None),
        refused={
            "start v": "volume v is in phase synced; shadowvol cutover v is next",
            **same("already reads from the source; nothing to undo", "undo v", "undo v --early"),
            **same("shadowvol cutover v first", "commit v", "commit v --keep-undo", "commit v --force"),
            **same("volume v is in phase synced; shadowvol abort v first", *DELETES, "retarget v --target {target}"),
            "wait v --for committed": "1 it is synced; shadowvol commit v leads there",
        },
        allowed={**EVERYWHERE, "resume v": (), "cutover v": ("undo v",), "abort v": ("start v", WAIT_SYNCED)},
    ),
    Phase(
        "synced, reads from the target",
        ("cutover v",),
        ("synced", "target", None),
        refused={
            "start v": "volume v is in phase synced; shadowvol commit v is next",
            **same("already reads from the target; shadowvol undo v", "cutover v", "cutover v --early"),
            **same("shadowvol abort v or shadowvol commit v first", *DELETES, "retarget v --target {target}"),
        },
        allowed={
            **EVERYWHERE,
            "undo v": ("cutover v",),
            "abort v": ("start v", WAIT_SYNCED, "cutover v"),
            "down v": ("up v",),
        },
    ),
    Phase(
        "committed, undo kept",
        ("commit v --keep-undo",),
        ("committed", "target", None),
        refused={
            **same("volume v is in phase committed; shadowvol undo v leads back", "start v", "cutover v", "abort v"),
            "retarget v --target {target}": "volume v is in phase committed; its migration is over",
            "delete v": "volume v is up; shadowvol down v first",
            WAIT_SYNCED: "1 it is committed",
        },
        allowed={**EVERYWHERE, "undo v": (WAIT_SYNCED, "cutover v", "commit v --keep-undo"), "down v": ("up v",)},
    ),
    Phase(
        "aborting",
        ("write", "pause v", "undo v --early", "abort v"),
        ("copying", "source", "abort"),
        refused={
            **{verb: UNDER_WAY[0] for verb in (*TRANSITIONS, "commit v --keep-undo", "abort v")},
            **same("its abort is under way: shadowvol wait v --for setup", *DELETES, "retarget v --target {target}"),
            "wait v --for setup": "1 copying is paused; shadowvol resume v",
            WAIT_SYNCED: "1 its abort is under way",
        },
        allowed={**PAUSED, "down v": ("up v",)},
    ),
    Phase(
        "committed",
        ("resume v", "wait v --for setup", "start v", WAIT_SYNCED, "cutover v", "commit v"),
        ("committed", "target", None),
        refused={
            **same("volume v is in phase committed; its migration is over", "start v", "cutover v", "abort v"),
            **same("committed without --keep-undo; it cannot be undone", "undo v", "undo v --early"),
            **same("volume v is committed already; nothing is left to do", "commit v", "commit v --keep-undo"),
            "retarget v --target {target}": "its migration is over",
            "delete v": "volume v is up; shadowvol down v first",
            "wait v --for setup": "1 it is committed",
        },
        allowed={**EVERYWHERE, "resume v": (), "down v": ("up v",)},
    ),
]


def write(volume: Volume) -> None:
    """Into the second zone, so that the source is not complete after an undo of a commit."""
    client = nbd.NBD()
    client.connect_uri(volume.uri)
    client.pwrite(b"\x5a" * 4096, 17 * MIB)
    client.shutdown()
    wait_for(lambda: volume.status()["io"]["clients"] == 0, 20, "the client has left")


def durable(home: Path) -> dict[str, bytes]:
    """The record, without the activity log, which empties by itself."""
    return {key: value for key, value in recorded(home).items() if "/activity" not in key}


def good(volume: Volume, verbs: Sequence[str]) -> None:
    for verb in verbs:
        if verb == "write":
            write(volume)
        else:
            volume.product.run(*shlex.split(verb))


def stands(volume: Volume) -> tuple[str, str, str | None]:
    status = volume.status()
    return status["phase"], status["preferred"], status["goal"]


@pytest.mark.timeout(600)
def test_each_verb_in_each_phase(product: Product, legs: Path, keep: Keep) -> None:
    """The whole matrix; after each refusal the record is what it was."""
    volume = Volume.make(product, make_source(legs / "source", SIZE_BYTES), legs / "target")
    for phase in PHASES:
        good(volume, phase.enter)
        assert stands(volume) == phase.shown, phase.name
        for verb, words in phase.refused.items():
            before = durable(product.home)
            ended = run(product.home, shlex.split(verb.format(target=volume.target)), hide=(legs,))
            keep(phase.name, ended.shown, ended.code, ended.line)
            code, words = (1, words[2:]) if words.startswith("1 ") else (3, words)
            ended.assert_refused(code, (words,))
            assert durable(product.home) == before, (phase.name, verb)
            assert stands(volume) == phase.shown, (phase.name, verb)
        for verb, back in phase.allowed.items():
            ended = run(product.home, shlex.split(verb.format(target=volume.target)), hide=(legs,))
            keep(phase.name, ended.shown, ended.code, ended.line)
            assert (ended.code, ended.err) == (0, ""), (phase.name, ended, product.log())
            good(volume, back)
            assert stands(volume) == phase.shown, (phase.name, verb, back)
