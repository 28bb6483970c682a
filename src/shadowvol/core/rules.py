"""The † rules: each order rule that loses acknowledged data when it is left out, by name.

Engines take `omit`, a set of these names, empty in the product; a test build leaves one out and the simulator
must then find lost or differing data (tests/sim/test_rules.py; docs/decisions/0004 has the table). The rule is obeyed
at the places that ask `name in omit`; there is no other copy of it. BY_CONSTRUCTION holds the rules that follow from
others, so that nothing is left to leave out.
"""

from typing import Final

RULES: Final[dict[str, str]] = {
    "last-ok-leg": "the last ok leg's bit is never cleared",
    "fault-before-ack": "a failed leg's bits are durably cleared before the write is acknowledged (D2)",
    "flush-failure-clears": "a failed flush clears the bits of the zones written since the last good flush",
    "flush-set-when-failed": "the set of zones of a failed flush is taken when it fails, not afterwards",
    "flush-counts-inflight": "a write in flight during a flush stays dirty",
    "new-member-all-dirty": "a new member incarnation takes every leg as dirty",
    "log-before-mirrored": "a zone is durably in the activity log before the first mirrored write",
    "unlog-only-clean": "a zone leaves the activity log only when both legs were flushed since its last write",
    "unlog-not-unsettled": "no zone leaves the activity log while the fault of a failed write is not settled",
    "unlog-own-set-first": "a zone leaves the member's own set before its durable removal, and returns only after it",
    "open-drains": "OPEN is answered when writes admitted before are finished",
    "open-all-members": "copying begins when every member has answered OPEN",
    "open-repeat-keeps": "a repeated OPEN changes nothing",
    "touched-keeps-inflight": "TOUCHED forgets only blocks with no write in flight",
    "hold-drains": "HOLD is answered when the writes in flight on these blocks are finished",
    "settled-when-closed": "writes of a window are not noted as touched only once the window is closed",
    "hold-slows": "HOLD takes the writes of its blocks' regions to the engine before it looks what is in flight",
    "hold-union": "HOLD and recopy cover the union of all members' touched blocks",
    "recopy-touched": "touched blocks are copied again under the hold",
    "hold-limit-tells": "a member whose hold ran out says so at RELEASE",
    "flush-both-legs": "both legs are flushed before the bits are set (D1)",
    "flush-copier": "the copier flushes its own connection before the bits are set (D1)",
    "flush-copier-session": "a window's flush counts only from the run of the copier that copied it",
    "flush-members": "every member flushes its connections before the bits are set (D1)",
    "window-only-copying": "a window is recorded only while the phase is copying when its transaction is built",
    "window-record-compare": "the bits are persisted only while the window's record is still there",
    "epoch-compare": "every change of the record compares the epoch",
    "done-holds": "where the copy's target leg is preferred, reads move under a hold at every member",
    "failed-write-voids": "a write that fails in an open window voids the window before it is answered (D3)",
    "failed-write-ends-window": "a member refuses every further step of a window in which a write failed",
    "unsettled-fault-refuses-open": "OPEN is refused while a failed write there is not settled",
    "flushes-end-together": "a flush is answered after those that were in flight at its end, and fails with them",
    "settle-keeps-later": "a settled flush failure forgets only what was written before it",
    "flush-error-after-writes": "a flush error is answered after the writes that were in flight",
    "flush-error-owed": "a flush error of a last ok leg reaches the application, whoever's flush saw it",
    "crash-voids": "the recovery of a member voids every open window",
    "recovery-clears": "recovery clears the non-preferred bit in the crashed member's logged zones",
    "recovery-only-both": "recovery clears only where both bits are set",
    "relaxed-only-adds": "a power failure may undo only records without which all is as well: windows, added bits",
    "recovery-same-txn": "recovery clears the bits in the transaction that empties the log",
    "switch-holds": "cutover and undo hold new writes and finish those in flight",
    "switch-drains-reads": "where reads move to the other leg, those in flight end before writes are let go",
    "switch-set-then-release": "every member switches before any member releases its writes",
    "clear-holds-reads": "reads move from a faulty leg at every member before any reads the other leg there",
    "void-waits-for-copier": "a void window's regions are not picked again before its copy jobs have ended",
    "void-keeps-record": "a void window's record stays until its copier has ended, for a successor to quarantine it",
    "quarantine": "a dead leader's window regions are not copied until its copier is known to have stopped",
    "undo-zone-clear": "after commit --keep-undo, source_ok is durably cleared before the first target-only write",
    "fresh-dropped": "a region that was overwritten whole is no longer fresh after a failed write, flush or window",
    "fresh-one-member": "fresh regions are spared their copy only where there is exactly one member",
    "drop-ends-fresh": "a region is not fresh where the copier of a void window could still write after the mark",
    "doubt-flips": "a region whose only ok leg failed a flush is ok on its copy alone, until that leg is written anew",
    "clear-inside": "the end of a window clears no bits of regions whose members it does not tell",
    "join-state-after-register": "a joining member is registered before it is given the state",
    "done-before-clear": "changes of the map and of preferred happen one after the other, each confirmed by all",
}

# Between an engine and a second executor of what it publishes: nbd/gate.py, and the last three filter.c. No product
# code asks for these names: the simulator leaves them out in its own member and in its model of the filter (tests/sim).
GATE_RULES: Final[dict[str, str]] = {
    "publish-before-effects": "the filter obeys what a call of the engine changed before its effects are performed",
    "take-on-drain": "a drain waits also for what the filter has in flight",
    "publish-before-take": "the filter obeys the new table before what it has in flight is taken",
    "collect-before-flush": "what the filter wrote is known before a flush begins",
    "collect-before-flush-ends": "what the filter wrote meanwhile is known when a flush ends",
    "collect-before-receive": "what the filter wrote is known before a request of the leader is obeyed",
    "unlog-lets-go-first": "the filter lets go of a zone before it leaves the activity log",
    "unlog-collects-again": "a zone that was written until the filter let go of it does not leave the log",
    "write-in-flight-counts": "a write of the filter's in flight counts as written when the gate collects",
    "ended-write-counts-again": "a write of the filter's counts again when it has ended",
    "write-is-noted": "a write of the filter's to an open window is noted",
    "noted-when-begun": "it is noted before its first byte, and its copy is repeated if CLOSE comes in its middle",
    "notes-before-receive": "what the filter noted is known before TOUCHED and CLOSE are obeyed",
    "touched-takes": "TOUCHED forgets no block of a write that the filter has in flight",
    "let-through-owns-range": "a write of the data path keeps overlapping ones of the filter's out",
}

BY_CONSTRUCTION: Final[dict[str, str]] = {
    "unlog-not-inflight": (
        "a write marks its zone dirty at admission, flush-counts-inflight keeps it dirty while it is in flight, "
        "and only clean zones leave the log"
    ),
    "collect-before-tick": (
        "a zone that seems idle because nothing was collected yet is collected again once the filter has let go of it "
        "(unlog-collects-again), and given back"
    ),
    "touch-on-completion": (
        "TOUCHED keeps the blocks of writes in flight (touched-keeps-inflight), CLOSE forgets nothing, and OPEN drains "
        "what was admitted before it; so a block is still touched when its write completes"
    ),
    "flush-failure-voids": (
        "whoever's writes a failed flush loses is told so at its own flush of step 7, which fails the window (a member "
        "restarted since: crash-voids; a copier: flush-copier-session); voiding all windows at once only saves time"
    ),
}

NONE_OMITTED: Final[frozenset[str]] = frozenset()
