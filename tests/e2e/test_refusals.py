"""Bad input, by the real command: each line of the table ends with its exit code and one clear line, changing nothing.

The host (tests/support/bad_input.py) is one for all of them, since none of them changes it.
"""

import os
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.bad_input import (
    SIZE_BYTES,
    Setup,
    World,
    a_client,
    a_loop_device_on,
    bad_input_world,
    files,
    in_use,
    long_names,
    newer_home,
    odd_homes,
    other_names_of,
    read_only,
    signed,
    unfit,
    unreadable,
)
from tests.support.endings import Keep, picture, run
from tests.support.product import COMMAND, MIB

AGENT_VERBS = (
    "start {0}",
    "pause {0}",
    "resume {0}",
    "cutover {0}",
    "cutover {0} --early",
    "undo {0}",
    "undo {0} --early",
    "commit {0}",
    "commit {0} --keep-undo",
    "commit {0} --force",
    "abort {0}",
    "throttle {0} --rate 1MiB/s",
    "throttle {0} --impact low",
)


@dataclass(frozen=True, slots=True)
class Case:
    """`command` is filled in with the names that `setup` yields, and with a, b, legs and the volumes' legs."""

    name: str
    command: str
    code: int
    words: tuple[str, ...]
    setup: Setup | None = None
    nobody: bool = False


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with bad_input_world() as made:
        yield made


# ---------------------------------------------------------------- the table


def plain(verb: str) -> str:
    """A verb with its options and without the name."""
    return " ".join(verb.replace("{0}", "").split())


def create(name: str, source: str, target: str, *words: str, setup: Setup | None = None, more: str = "") -> Case:
    return Case(name, f"create n --source {source} --target {target} {more}".strip(), 2, words, setup)


CREATE = "create n --source {a} --target {b}"
SAME = ("are the same storage",)
LEGS = [
    create(
        "target smaller", "{a}", "{small}", "too small: 2097152 bytes", "4194304", setup=files(small=SIZE_BYTES // 2)
    ),
    create("target one sector smaller", "{a}", "{small}", "too small", setup=files(small=SIZE_BYTES - 512)),
    create("same path", "{a}", "{a}", *SAME),
    *(
        create(f"same storage: {kind}", "{a}", f"{{{kind}}}", *SAME, setup=other_names_of("a"))
        for kind in ("dots", "hard", "soft", "folder", "bind")
    ),
    create("same storage: loop device", "{a}", "{loop}", *SAME, setup=a_loop_device_on("a")),
    create("same storage: loop device first", "{loop}", "{a}", *SAME, setup=a_loop_device_on("a")),
    *(
        create(f"target {kind}", "{a}", f"{{{kind}}}", "target ", words, setup=unfit)
        for kind, words in {
            "folder": "is a directory",
            "missing": "does not exist; --provision makes it",
            "dangling": "does not exist",
            "fifo": "is neither a file nor a block device",
            "socket": "is neither a file nor a block device",
            "empty": "is empty (0 bytes)",
            "odd": "4194305 bytes, is not a multiple of 512",
        }.items()
    ),
    *(
        create(f"source {kind}", f"{{{kind}}}", "{b}", "source ", words, setup=unfit)
        for kind, words in {
            "folder": "is a directory",
            "missing": "does not exist",
            "empty": "is empty (0 bytes)",
            "odd": "not a multiple of 512",
        }.items()
    ),
    create("source is no storage", "/dev/null", "{b}", "source /dev/null: is neither a file nor a block device"),
    create("source of another volume", "{vs}", "{b}", "is the source of volume v", "when its volume is deleted"),
    create("target of another volume", "{a}", "{vt}", "is the target of volume v"),
    create("source of a volume that is down", "{ws}", "{b}", "is the source of volume w", "when its volume is deleted"),
    create("target of a volume that is down", "{a}", "{wt}", "is the target of volume w"),
    create("its hard link", "{a}", "{hard}", "is the target of volume w", setup=other_names_of("wt")),
    create("a loop device on it", "{a}", "{loop}", "is the target of volume w", setup=a_loop_device_on("wt")),
    create(
        "the target of a volume in setup, by hard link", "{a}", "{hard}", "the target of", setup=other_names_of("vt")
    ),
    create("mounted device", "{a}", "{device}", "target ", "is mounted at", "unmount it first", setup=in_use),
    create("file of a mounted device", "{a}", "{file}", "target ", "is mounted at", setup=in_use, more="--force"),
    create("mounted source", "{device}", "{a}", "source ", "is mounted at", setup=in_use),
    create("leg in use elsewhere", "{a}", "{claimed}", "is in use by another process", setup=in_use),
    create("target with a file system", "{a}", "{ext4}", "carries data (ext4); --force", setup=signed),
    create("target with swap", "{a}", "{swap}", "carries data (swap); --force", setup=signed),
    create("target with a partition table", "{a}", "{partitions}", "carries data (dos); --force", setup=signed),
    create("read-only disk", "{a}", "{device}", "is read-only", setup=read_only),
    create("read-only file system", "{a}", "{ro}/leg", "cannot be opened for writing: Read-only", setup=read_only),
    create("--provision of what is there", "{a}", "{b}", "exists already; leave out --provision", more="--provision"),
    create("--provision nowhere", "{a}", "{a}/x", "cannot be made: Not a directory", more="--provision"),
    create("--provision of a device", "{a}", "/dev/sdx", "makes files, not devices", more="--provision"),
    create("--provision, read-only", "{a}", "{ro}/x", "cannot be made: Read-only", setup=read_only, more="--provision"),
]
VALUES = [
    *(
        Case(f"volume name {name}", f"create {shlex.quote(name)} --source {{a}} --target {{b}}", 2, words)
        for name, words in {
            "": ("'' is not a volume name: 1 to 48 of",),
            "V": ("'V' is not a volume name",),
            "ü": ("'ü' is not a volume name",),
            "a/b": ("is not a volume name",),
            "..": ("is not a volume name",),
            "x" * 49: ("is not a volume name",),
            "agent": ("the name agent is taken by shadowvol itself",),
            "a.transfer": ("is taken by shadowvol itself",),
        }.items()
    ),
    Case("name of a volume that is there", "create v --source {a} --target {b}", 2, ("there is a volume v already",)),
    *(
        create(f"region size {size}", "{a}", "{b}", words, more=f"--region-size={shlex.quote(size)}")
        for size, words in {
            "": "'' is not a size; write 4MiB",
            "-4MiB": "'-4MiB' is not a size",
            "4MB": "'4MB' is not a size",
            "1e6": "'1e6' is not a size",
            "0": "a power of two from 64KiB to 1GiB, not 0 bytes",
            "3MiB": "a power of two from 64KiB to 1GiB",
            "32KiB": "a power of two from 64KiB to 1GiB",
            "2GiB": "a power of two from 64KiB to 1GiB",
        }.items()
    ),
    create(
        "too many regions",
        "{huge}",
        "{other}",
        "would be 8388608, at most 4194304",
        "--region-size 1MiB is the default",
        setup=files(huge=512 << 30, other=512 << 30),
        more="--region-size 64KiB",
    ),
    create("kind tree", "{a}", "{b}", "kind tree are not in this version", more="--kind tree"),
    create("unknown kind", "{a}", "{b}", "'tape' is not one of", more="--kind tape"),
    create("leg timeout", "{a}", "{b}", "'soon' is not a duration", more="--leg-timeout soon"),
    create("NBD leg", "nbd://host/x", "{b}", "source nbd://host/x: NBD legs are not supported yet"),
    create("NBD leg by socket", "{a}", "'nbd+unix:///x?socket=s'", "target nbd+unix", "NBD legs are not supported yet"),
    create("unknown URI", "{a}", "ftp://host/x", "target ftp://host/x: unknown kind of leg, give a path"),
    create("empty leg", "''", "{b}", "source is empty; give a path"),
    create("path not UTF-8", "{a}", "{a}\udcff", "is UTF-8 without control characters"),
    create("path with a line end", "{a}", "'{a}\n'", "is UTF-8 without control characters"),
    create("path too long", "{a}", "{path}", "has a path of 5000 bytes", "4095", setup=long_names),
    create("file name too long", "{a}", "{component}", "File name too long", setup=long_names),
    create("option given twice", "{a}", "{b}", "--target is given more than once", more="--target {vt}"),
    Case("no source", "create n --target {b}", 2, ("Missing option '--source'", "create --help")),
    Case("no verb", "", 2, ("Missing command",)),
    Case("unknown verb", "finish v", 2, ("No such command 'finish'",)),
    Case("verb of a later version", "fence --confirm h", 2, ("No such command 'fence'",)),
    Case("unknown option", "start v --early", 2, ("No such option '--early'",)),
    Case("two names", "start v w", 2, ("unexpected extra argument",)),
    Case("no rate", "throttle v", 2, ("give --rate, --impact, --min-rate or --finish-by",)),
    Case("rate 0", "throttle v --rate 0", 2, ("a rate is above 0",)),
    Case("negative rate", "throttle v --rate=-1MiB/s", 2, ("'-1MiB/s' is not a rate",)),
    Case("rate beyond any disk", "throttle v --rate 9999999PiB", 2, ("a rate is at most",)),
    Case("smallest rate 0", "throttle v --min-rate 0", 2, ("a rate is above 0",)),
    Case("a time that is over", "throttle v --finish-by 2020-01-01T00:00", 2, ("is over already",)),
    Case("no time", "throttle v --finish-by soon", 2, ("'soon' is not a time",)),
    Case("unknown impact", "throttle v --impact some", 2, ("'some' is not one of",)),
    Case("unknown phase", "wait v --for never", 2, ("'never' is not one of",)),
    Case("negative time", "wait v --for synced --timeout=-1", 2, ("'-1' is not a duration",)),
    Case("live view and JSON", "status v --watch --json", 2, ("do not go together",)),
]
HOMES = [
    Case("empty home", "--home '' status", 2, ("--home is empty",)),
    Case("empty state", "--state '' status", 2, ("--state is empty",)),
    Case("empty host", "--host '' status", 2, ("--host is empty",)),
    Case("two homes", "--home {legs} --home {legs} status", 2, ("--home is given more than once",)),
    Case("home is a file", "--home {file} status", 2, ("cannot be used: it is not a directory",), odd_homes),
    Case("home below a file", "--home {below} create n --source {a} --target {b}", 2, ("Not a directory",), odd_homes),
    Case("home not UTF-8", "--home {legs}/\udcff status", 2, ("cannot be used: its name is not UTF-8",)),
    Case("home too long", "--home {home} status", 2, ("107", "choose a shorter --home"), long_names),
    Case("read-only home, create", "--home {ro}/n create n --source {a} --target {b}", 2, ("Read-only",), read_only),
    Case("read-only home, up", "--home {ro}/h create n --source {a} --target {b}", 2, ("Read-only",), read_only),
    Case("bad host", "--host a/b status", 2, ("'a/b' is not a host name",)),
    Case(
        "unknown state",
        "--home {idle} --state nonsense status",
        2,
        ("is not a state URL; it has the form sqlite:PATH",),
    ),
    Case("etcd", "--home {idle} --state etcd://127.0.0.1:1 status", 2, ("etcd is not in this version",)),
    Case("not the agent's state", "--state sqlite:{missing} start v", 2, ("works on the state sqlite:",), odd_homes),
    Case(
        "state out of reach",
        "--home {idle} --state sqlite:{missing} status",
        6,
        ("state.sqlite: No such file",),
        odd_homes,
    ),
    Case("state is no record", "--home {idle} --state sqlite:{file} status", 1, ("file is not a database",), odd_homes),
    *(
        Case(f"newer data format, {verb.split()[0]}", f"--home {{newer}} {verb}", 1, newer, newer_home)
        for newer in [("written by a newer shadowvol (format 99; this one reads 1)", "use that one")]
        for verb in (
            "status",
            "status i --json",
            CREATE,
            "up i",
            "start i",
            "delete i",
            "agent",
        )
    ),
    *(
        Case(f"another's home, {verb.split()[0]}", verb, 2, ("no permission; it belongs to user root",), None, True)
        for verb in ("status", "status v --json", "up v", "start v", "delete w", CREATE)
    ),
]
NOBODY = "--home {nobody} create n --source {secret} --target {mine}"
NOBODY_TARGET = "--home {nobody} create n --source {mine} --target {visible}"
PERMISSION = [
    Case("leg without permission to read", NOBODY, 2, ("source ", "secret: ", "Permission denied"), unreadable, True),
    Case("to write", NOBODY_TARGET, 2, ("target ", "opened for writing: Permission denied"), unreadable, True),
]
VOLUMES = [
    *(
        Case(
            f"unknown volume, {plain(verb)}",
            verb.replace("{0}", "x"),
            4,
            ("there is no volume x; shadowvol status lists",),
        )
        for verb in (*AGENT_VERBS, "status {0}", "status {0} --json", "up {0}", "up v {0}", "down {0}", "delete {0}")
    ),
    Case("unknown volume, wait", "wait x --for synced", 4, ("there is no volume x",)),
    Case("unknown volume, retarget", "retarget x --target {b}", 4, ("there is no volume x",)),
    *(
        Case(f"volume is down, {plain(verb)}", verb.replace("{0}", "w"), 3, ("volume w is down", "shadowvol up w"))
        for verb in AGENT_VERBS
    ),
    *(
        Case(
            f"no agent, {plain(verb)}",
            f"--home {{idle}} {verb.replace('{0}', 'i')}",
            1,
            ("no agent is running", " up i"),
        )
        for verb in (*AGENT_VERBS, "retarget {0} --target {b}", "down {0}")
    ),
    Case("wait for what cannot be", "wait v --for synced", 1, ("it is setup; shadowvol start v leads there",)),
    Case("wait, volume down", "wait w --for synced", 1, ("it is setup; shadowvol start w leads there",)),
    Case("wait, no agent", "--home {idle} wait i --for synced", 1, ("it is setup; shadowvol start i leads there",)),
    Case("down with a client", "down v", 3, ("volume v has 1 client connection", "--force"), a_client),
    Case("delete while up", "delete v", 3, ("volume v is up; shadowvol down v first",)),
    Case("retarget: source", "retarget v --target {vs}", 2, SAME),
    Case("retarget: smaller", "retarget v --target {small}", 2, ("too small",), files(small=MIB)),
    Case("retarget: missing", "retarget v --target {legs}/x", 2, ("does not exist; --provision makes it",)),
    Case("retarget: another volume's", "retarget v --target {wt}", 2, ("is the target of volume w",)),
    Case("retarget: a file system", "retarget v --target {ext4}", 2, ("carries data (ext4); --force",), signed),
    Case("retarget: --provision", "retarget v --target {b} --provision", 2, ("exists already",)),
    Case("retarget: empty", "retarget v --target ''", 2, ("target is empty; give a path",)),
]
CASES = LEGS + VALUES + HOMES + PERMISSION + VOLUMES


@pytest.mark.parametrize("case", CASES, ids=lambda case: ascii(case.name.replace(" ", "-"))[1:-1])
def test_bad_input_ends_with_its_code_and_changes_nothing(world: World, case: Case, keep: Keep) -> None:
    """Exit code, one or two lines with these words, nothing on stdout; record, legs and files are as before."""
    legs = {path.name: str(path) for path in world.legs.iterdir()}
    homes = {"legs": str(world.legs), "idle": str(world.idle.home)}
    before = picture((world.product, world.idle), world.legs)
    with case.setup(world) if case.setup is not None else ExitStack() as names:
        given = legs | homes | (names if isinstance(names, dict) else {})
        words = shlex.split(case.command.format(**{name: shlex.quote(value) for name, value in given.items()}))
        ended = run(world.home, words, nobody=case.nobody, hide=(world.folder / "case", world.legs, world.folder))
    keep(case.name, ended.shown, ended.code, ended.line)
    ended.assert_refused(case.code, case.words)
    assert picture((world.product, world.idle), world.legs) == before


# ---------------------------------------------------------------- where the output goes


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("shadowvol status v >&-", 0, ""),
        ("shadowvol status v --json >&-", 0, ""),
        ("shadowvol finish v 2>&-", 2, ""),
        ("shadowvol finish v 2>/dev/full", 2, ""),
        ("shadowvol status x >&- 2>&- <&-", 4, ""),
        ("shadowvol status v >/dev/full", 1, "standard output cannot be written: No space left on device; "),
        ("shadowvol --help >/dev/full", 1, "standard output cannot be written"),
        ("shadowvol status v | head -0", 1, ""),
        ("shadowvol status v --json | head -c 1", 1, ""),
    ],
)
def test_no_place_for_the_output_is_no_traceback(world: World, line: str, code: int, words: str, keep: Keep) -> None:
    """A closed or full standard output or error changes no exit code but where the output is the point."""
    environment = dict(os.environ, SHADOWVOL_HOME=str(world.home))
    environment["PATH"] = f"{Path(COMMAND).parent}:{environment['PATH']}"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    keep("output", line.removeprefix("shadowvol "), done.returncode, done.stderr.strip().removeprefix("shadowvol: "))
    assert "head -c" in line or done.returncode == code, done
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr, done
    assert words in done.stderr if words else not done.stderr, done
