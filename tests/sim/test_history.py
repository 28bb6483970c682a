"""The judge can fail: hand-made histories with a known verdict."""

from tests.sim.history import History, WriteOp


def write(history: History, value: int, start: float, end: float = float("inf"), host: str = "h0") -> WriteOp:
    op = WriteOp(value, host, start, end)
    history.wrote(0, op)
    return op


def read(history: History, value: int, start: float, end: float) -> None:
    history.blocks[0].reads.append((value, start, end))


def verdict(history: History) -> list[str]:
    history.judge()
    return history.problems


def test_a_read_of_the_last_write_is_right() -> None:
    history = History(1)
    write(history, 1, 1.0, 2.0)
    read(history, 1, 3.0, 4.0)
    assert not verdict(history)


def test_a_lost_write_is_found() -> None:
    """Acknowledged, then a read finds what was there before."""
    history = History(1)
    write(history, 1, 1.0, 2.0)
    read(history, 0, 3.0, 4.0)
    assert verdict(history)


def test_a_read_that_goes_back_is_found() -> None:
    """New, then old: also while the write is not acknowledged yet."""
    history = History(1)
    write(history, 1, 1.0, 9.0)
    read(history, 1, 2.0, 3.0)
    read(history, 0, 4.0, 5.0)
    assert verdict(history)


def test_concurrent_reads_may_differ() -> None:
    """Overlapping reads of a write in flight may see either value; so may a read that overlaps the write."""
    history = History(1)
    write(history, 1, 1.0, 9.0)
    read(history, 1, 2.0, 5.0)
    read(history, 0, 3.0, 6.0)
    read(history, 0, 0.0, 1.5)
    assert not verdict(history)


def test_concurrent_writes_may_end_in_either_order_but_only_in_one() -> None:
    history = History(1)
    write(history, 1, 1.0, 5.0)
    write(history, 2, 2.0, 4.0)
    read(history, 1, 6.0, 7.0)
    assert not verdict(history)
    read(history, 2, 8.0, 9.0)
    assert verdict(history)


def test_an_unacknowledged_write_may_appear_or_not() -> None:
    history = History(1)
    write(history, 1, 1.0)
    read(history, 0, 2.0, 3.0)
    read(history, 1, 4.0, 5.0)
    assert not verdict(history)


def test_a_write_that_failed_may_appear_and_vanish_but_not_before_it_began() -> None:
    history = History(1)
    write(history, 1, 1.0).failed = True
    read(history, 1, 2.0, 3.0)
    read(history, 0, 4.0, 5.0)
    assert not verdict(history)
    read(history, 1, 0.1, 0.2)
    assert verdict(history)


def test_a_value_read_before_it_was_written_is_found() -> None:
    history = History(1)
    write(history, 1, 5.0, 6.0)
    read(history, 1, 1.0, 2.0)
    assert verdict(history)


def test_a_flushed_write_survives_a_power_loss() -> None:
    """What was flushed is there; an older value is not accepted any more."""
    for value, expected in ((1, True), (0, False)):
        history = History(1)
        write(history, 1, 1.0, 2.0)
        history.flushed("h0", 3.0)
        history.power_loss(4.0)
        history.era_start = 5.0
        read(history, value, 6.0, 7.0)
        assert (not verdict(history)) is expected


def test_an_unflushed_write_may_be_lost_but_reads_after_the_loss_agree() -> None:
    history = History(1)
    write(history, 1, 1.0, 2.0)
    history.power_loss(4.0)
    history.era_start = 5.0
    read(history, 0, 6.0, 7.0)
    assert not verdict(history)
    read(history, 1, 8.0, 9.0)
    assert verdict(history)


def test_a_flush_covers_only_its_own_hosts_finished_writes() -> None:
    """A write of another host, or one that ended after the flush began, may still be lost."""
    for host, end in (("h1", 2.0), ("h0", 3.5)):
        history = History(1)
        write(history, 1, 1.0, end, host)
        history.flushed("h0", 3.0)
        history.power_loss(4.0)
        history.era_start = 5.0
        read(history, 0, 6.0, 7.0)
        assert not verdict(history)


def test_after_a_flush_error_a_later_good_flush_proves_nothing_about_the_writes_before() -> None:
    history = History(1)
    write(history, 1, 1.0, 2.0)
    history.flush_failed("h0")
    history.flushed("h0", 3.0)
    history.power_loss(4.0)
    history.era_start = 5.0
    read(history, 0, 6.0, 7.0)
    assert not verdict(history)
