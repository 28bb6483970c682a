"""`create` refuses what cannot be two legs, changes nothing then, and records what can (DESIGN 8)."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from shadowvol.endpoints.local import open_local
from tests.cli.conftest import MIB, Shell
from tests.support.loopdev import loop_device, make_ext4, mounted

Leg = Callable[..., Path]


def refuse(
    shadowvol: Shell, source: Path | str, target: Path | str, *words: str, options: tuple[str, ...] = ()
) -> None:
    """Refused as bad input, with these words, by --dry-run as well; and nothing is recorded."""
    before = shadowvol.recorded()
    command = ("create", "v", "--source", source, "--target", target, *options)
    shadowvol.inside(*command, "--dry-run").refused(2, *words)
    shadowvol.inside(*command).refused(2, *words)
    assert shadowvol.recorded() == before


def test_a_volume_is_recorded_and_the_next_command_is_told(shadowvol: Shell, leg: Leg) -> None:
    out = shadowvol.good("create", "v1", "--source", leg("a"), "--target", leg("b", 9 * MIB))
    assert len(out.splitlines()) == 1
    assert "created volume v1" in out and "shadowvol up v1" in out
    status = shadowvol.status("v1")
    assert (status["phase"], status["preferred"], status["size_bytes"]) == ("setup", "source", 8 * MIB)
    assert (status["regions_total"], status["regions_source_ok"], status["regions_target_ok"]) == (8, 8, 0)
    assert shadowvol.home.stat().st_mode & 0o777 == 0o700


def test_a_dry_run_says_what_would_be_created_and_makes_nothing(shadowvol: Shell, leg: Leg) -> None:
    """Neither the record, nor the home, nor the target."""
    legs = ("--source", leg("a"), "--target", "b", "--provision")
    there = sorted(os.listdir(shadowvol.folder))
    out = shadowvol.good("create", "v", *legs, "--dry-run")
    assert "would create volume v: 8 MiB" in out
    assert sorted(os.listdir(shadowvol.folder)) == there
    shadowvol.good("create", "v", *legs)
    before = shadowvol.recorded()
    shadowvol("create", "w", "--source", "a", "--target", "c", "--provision", "--dry-run").refused(2, "of volume v")
    assert shadowvol.recorded() == before


def test_relative_paths_start_where_the_command_was_given(shadowvol: Shell, leg: Leg) -> None:
    leg("a"), leg("b")
    shadowvol.good("create", "v", "--source", "a", "--target", "./b")
    assert shadowvol.status("v")["legs"]["target"]["uri"] == str(shadowvol.folder / "b")


def test_one_name_is_one_volume(shadowvol: Shell, leg: Leg) -> None:
    shadowvol.good("create", "v", "--source", leg("a"), "--target", leg("b"))
    refuse(shadowvol, leg("c"), leg("d"), "there is a volume v already")


def test_what_is_no_volume_name_is_refused(shadowvol: Shell, leg: Leg) -> None:
    legs = ("--source", leg("a"), "--target", leg("b"))
    for name in ("V", "", "-v", ".v", "a/b", "a b", "x" * 49, "v\n", "agent", "link", "a.transfer"):
        shadowvol.inside("create", *legs, "--", name).refused(2)
    assert not shadowvol.home.exists()


def test_unusual_volume_names_are_fine(shadowvol: Shell, leg: Leg) -> None:
    """The home is near the root: the longest name's socket would not fit below this test's own directory."""
    names = ["0", "a.b_c-d", "x" * 48]
    with tempfile.TemporaryDirectory(prefix="sv") as home:
        near = Shell(shadowvol.folder, Path(home))
        for number, name in enumerate(names):
            near.good("create", name, "--source", leg(f"a{number}"), "--target", leg(f"b{number}"))
        assert near.names() == names


def test_the_same_storage_by_another_name_is_no_target(shadowvol: Shell, leg: Leg) -> None:
    source = leg("a")
    os.link(source, shadowvol.folder / "hard")
    (shadowvol.folder / "soft").symlink_to(source)
    (shadowvol.folder / "folder").symlink_to(shadowvol.folder)
    for other in ("a", "./a", "hard", "soft", "folder/a"):
        refuse(shadowvol, source, other, "same storage")


def test_a_loop_device_on_the_source_is_no_target(shadowvol: Shell, leg: Leg) -> None:
    source = leg("a")
    with loop_device(source) as device:
        refuse(shadowvol, source, device, "same storage")
        refuse(shadowvol, device, source, "same storage")


def test_loop_devices_are_legs(shadowvol: Shell, leg: Leg) -> None:
    with loop_device(leg("a")) as source, loop_device(leg("b")) as target:
        shadowvol.good("create", "v", "--source", source, "--target", target)
        assert shadowvol.status("v")["legs"]["source"]["uri"] == source


def test_a_leg_that_another_device_lies_on_is_refused(shadowvol: Shell, leg: Leg) -> None:
    source, target = leg("a"), leg("b")
    with loop_device(target) as device:
        refuse(shadowvol, source, target, "in use by", device)


def test_unfit_legs_are_refused(shadowvol: Shell, leg: Leg) -> None:
    good = leg("good")
    (shadowvol.folder / "folder").mkdir()
    (shadowvol.folder / "dangling").symlink_to("nowhere")
    os.mkfifo(shadowvol.folder / "fifo")
    leg("empty", 0), leg("odd", 8 * MIB + 1)
    cases = {
        "folder": "directory",
        "missing": "does not exist",
        "dangling": "does not exist",
        "fifo": "neither",
        "empty": "empty",
        "odd": "multiple of 512",
        "nbd://host/x": "not supported yet",
        "ftp://host/x": "unknown kind",
        "": "give a path",
    }
    for path, words in cases.items():
        refuse(shadowvol, good, path, "target", words)
        refuse(shadowvol, path, good, "source", words)


def test_a_smaller_target_is_refused(shadowvol: Shell, leg: Leg) -> None:
    refuse(shadowvol, leg("a"), leg("b", 8 * MIB - 512), "too small", "8388608")


def test_a_leg_that_cannot_be_written_is_refused(shadowvol: Shell, leg: Leg) -> None:
    with loop_device(leg("b"), "--read-only") as device:
        refuse(shadowvol, leg("a"), device, "is read-only")


def test_a_mounted_leg_is_refused_even_with_force(shadowvol: Shell, leg: Leg) -> None:
    backing, free = leg("a", 16 * MIB), leg("b", 16 * MIB)
    make_ext4(backing)
    place = shadowvol.folder / "place"
    with loop_device(backing) as device, mounted(device, place):
        for mounted_leg in (device, backing):
            refuse(shadowvol, mounted_leg, free, "source", f"mounted at {place}", options=("--force",))
            refuse(shadowvol, free, mounted_leg, "target", f"mounted at {place}", options=("--force",))


def test_a_target_with_a_signature_needs_force(shadowvol: Shell, leg: Leg) -> None:
    source, target = leg("a"), leg("b")
    make_ext4(source)
    make_ext4(target)
    refuse(shadowvol, source, target, "ext4", "--force")
    shadowvol.good("create", "v", "--source", source, "--target", target, "--force")


def test_a_leg_of_another_volume_is_refused(shadowvol: Shell, leg: Leg) -> None:
    source, target, third = leg("a"), leg("b"), leg("c")
    shadowvol.good("create", "first", "--source", source, "--target", target)
    os.link(target, shadowvol.folder / "hard")
    refuse(shadowvol, source, third, "source of volume first")
    refuse(shadowvol, third, source, "source of volume first")
    refuse(shadowvol, third, target, "target of volume first", options=("--force",))
    refuse(shadowvol, shadowvol.folder / "hard", third, "target of volume first")
    with loop_device(target) as device:
        refuse(shadowvol, third, device, "target of volume first")
    with target.open("r+b") as file:
        file.truncate(12 * MIB)
    refuse(shadowvol, third, target, "target of volume first")
    shadowvol.good("delete", "first")
    shadowvol.good("create", "second", "--source", third, "--target", target)


def test_a_leg_that_somebody_claims_is_refused(shadowvol: Shell, leg: Leg) -> None:
    source, target = leg("a"), leg("b")
    claimed = open_local(str(target), cache="host", writable=True, claim=True)
    try:
        refuse(shadowvol, source, target, "in use by another process")
    finally:
        claimed.close()
    shadowvol.good("create", "v", "--source", source, "--target", target)


def test_provision_makes_a_sparse_target(shadowvol: Shell, leg: Leg) -> None:
    shadowvol.good("create", "v", "--source", leg("a", 64 * MIB), "--target", "new", "--provision")
    info = (shadowvol.folder / "new").stat()
    assert info.st_size == 64 * MIB
    assert info.st_blocks * 512 < MIB


def test_provision_takes_nothing_that_is_there(shadowvol: Shell, leg: Leg) -> None:
    source, target = leg("a"), leg("b")
    refuse(shadowvol, source, target, "exists already", options=("--provision",))
    assert target.exists()
    refuse(shadowvol, source, "no-such-folder/b", "cannot be made", options=("--provision",))
    refuse(shadowvol, source, "/dev/shadowvol-no-such-device", "not devices", options=("--provision",))
    assert not os.path.exists("/dev/shadowvol-no-such-device")


def test_a_provisioned_target_goes_again_when_create_fails(shadowvol: Shell, leg: Leg) -> None:
    source = leg("a")
    shadowvol.good("create", "first", "--source", source, "--target", leg("b"))
    refuse(shadowvol, source, "new", "source of volume first", options=("--provision",))
    assert not (shadowvol.folder / "new").exists()


def test_region_sizes_out_of_range_are_refused(shadowvol: Shell, leg: Leg) -> None:
    source, target = leg("a"), leg("b")
    for size in ("1MB", "3MiB", "32KiB", "2GiB", "0", "-1MiB", "many", "1.0000001MiB"):
        refuse(shadowvol, source, target, options=("--region-size", size))


def test_a_map_of_too_many_regions_is_refused(shadowvol: Shell, leg: Leg) -> None:
    huge = 2 << 40
    refuse(shadowvol, leg("a", huge), leg("b", huge), "--region-size 1MiB", options=("--region-size", "64KiB"))


def test_region_sizes_in_range_are_taken(shadowvol: Shell, leg: Leg) -> None:
    for number, (size, count) in enumerate((("64KiB", 128), ("4MiB", 2), ("1GiB", 1), ("131072", 64))):
        name, legs = f"v{number}", ("--source", leg(f"a{number}"), "--target", leg(f"b{number}"))
        shadowvol.good("create", name, *legs, "--region-size", size)
        assert shadowvol.status(name)["regions_total"] == count


def test_trees_are_refused_as_not_in_this_version(shadowvol: Shell, leg: Leg) -> None:
    refuse(shadowvol, leg("a"), leg("b"), "not in this version", options=("--kind", "tree"))


def test_a_home_too_deep_for_sockets_is_refused_at_once(shadowvol: Shell, leg: Leg) -> None:
    deep = shadowvol.folder / ("x" * 100)
    arguments = ("--home", deep, "create", "v", "--source", leg("a"), "--target", leg("b"))
    shadowvol(*arguments).refused(2, "socket path", "--home")
    assert not deep.exists()


def test_a_name_too_long_for_its_socket_is_refused_at_once(shadowvol: Shell, leg: Leg) -> None:
    room = 107 - len(os.fsencode(shadowvol.folder)) - len("/" + "/run/agent.sock")
    home = shadowvol.folder / ("h" * (room - 1))
    arguments = ("--source", leg("a"), "--target", leg("b"))
    shadowvol("--home", home, "create", "a-longer-name", *arguments).refused(2, "socket path")
    assert shadowvol("--home", home, "create", "abc", *arguments).code == 0
