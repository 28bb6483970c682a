"""Where an I/O goes: one published byte per region, and the function that reads it. The complete routing is here.

A published byte says: the leg that serves reads, the legs that every write must reach, whether the blocks of a write
are to be noted before its first byte (those that a window's copy must repeat, until the window is closed), and whether
a write needs the member engine first (to wait where blocks are held, to clear an undo zone, to note that a whole
region was overwritten).
It is derived from the region's bits and the volume's state by `published()`, only by the member engine.
"""

from shadowvol.core.legs import BOTH_OK, S_OK, SOURCE, T_OK, TARGET, Phase

READ_TARGET = 1  # else reads go to the source
WRITE_SOURCE = 2
WRITE_TARGET = 4
SLOW = 8  # a write needs the member engine before and after
WHOLE_SLOW = 16  # a write that covers a whole region does (it may spare the region its copy)
NOTE = 32  # the blocks of a write are noted as touched before its first byte
WRITE_SHIFT = 1  # (byte >> WRITE_SHIFT) & BOTH_OK is the set of legs as in the map's bits
MIXED = -1  # the range's regions disagree: serve run by run

# Bits in the member's own byte per region, above the map's two bits.
IN_WINDOW = 4
FRESH = 8  # overwritten whole on both legs while one-legged: needs no copy, only a window to say so
SETTLED = 16  # in a window that is closed: no copy of it is to come but under a hold
HELD = 32  # some of its blocks are held and copied: its writes are the engine's


def published(own: int, phase: Phase, preferred: int) -> int:
    """The published byte for a region whose own byte (map bits, IN_WINDOW, FRESH, SETTLED, HELD) is `own`."""
    ok = own & BOTH_OK
    if ok == 0:
        return SLOW
    if phase is Phase.COMMITTED:
        # Only the target is written; where the source still counts for undo-after-commit it must be cleared first.
        return READ_TARGET | WRITE_TARGET | (SLOW if ok & S_OK else 0)
    read = preferred if ok & (1 << preferred) else (SOURCE if ok & S_OK else TARGET)
    # Before a start and after an abort the target is nobody's to write, though a window may not have been dropped yet.
    legs = BOTH_OK if own & (IN_WINDOW | FRESH) and phase is not Phase.SETUP else ok
    byte = (READ_TARGET if read == TARGET else 0) | (WRITE_SOURCE if legs & S_OK else 0)
    byte |= WRITE_TARGET if legs & T_OK else 0
    one_legged_copying = phase is Phase.COPYING and legs != BOTH_OK
    noted = own & IN_WINDOW and not own & SETTLED and phase is not Phase.SETUP
    byte |= (NOTE if noted else 0) | (SLOW if own & HELD else 0)
    return byte | (WHOLE_SLOW if one_legged_copying else 0)


def published_table(phase: Phase, preferred: int) -> bytes:
    """`published()` as a 256-byte table for bytes.translate."""
    return bytes(published(own, phase, preferred) for own in range(256))


def route(table: bytearray, lo: int, hi: int) -> int:
    """The byte that all regions of [lo, hi) share, or MIXED."""
    byte = table[lo]
    if hi - lo == 1 or table.count(byte, lo, hi) == hi - lo:
        return byte
    return MIXED


def equal_runs(table: bytearray, lo: int, hi: int) -> list[tuple[int, int, int]]:
    """(lo, hi, byte) runs of equal bytes that make up [lo, hi)."""
    runs: list[tuple[int, int, int]] = []
    position = lo
    while position < hi:
        byte = table[position]
        tail = table[position:hi]
        length = len(tail) - len(tail.lstrip(bytes([byte])))
        runs.append((position, position + length, byte))
        position += length
    return runs
