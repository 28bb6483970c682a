"""The SQLite file that is the record of truth of one host: its format, its durability, its reserve of space.

`StateFile` is blocking and knows no trio; sqlite.py runs it in a thread. Several may be open on one file, in one
process or in many.

Invariants
- What a commit returned as ok is durable: WAL, synchronous=FULL. No reader sees it before it is durable.
- A group of relaxed commits only is written to the log without an fsync (synchronous=NORMAL). The next fsync is of the
  whole log, and SQLite's recovery ends at the first frame that is not whole: so a power failure takes relaxed commits
  from the end only, never one that a durable one follows.
- The store's revision grows by one with each transaction that changes a key, so no two transactions share one.
- Every value carries a checksum of key and value, judged whenever it is read (also by a compare). A value that does not
  match stops the caller with RecordDamaged; other keys stay readable.
- This process never opens the database file except through SQLite: closing any other descriptor of it would drop the
  POSIX locks of every connection here.

A full disk does not stop commits, because the space is ours beforehand:
- The log (-wal) is filled up to RESERVE_BYTES once and then written in place: SQLite starts it anew after each complete
  checkpoint, and cuts it back to that size, not further (journal_size_limit).
- The database holds about as many free pages, made by inserting a filler, carrying it over and deleting it again.
- The last connection to close would delete the log. Deleting it needs an exclusive lock, and the connection that we
  close last is read-only, where that lock cannot be had. So the log stays, and the next start finds its space.
Limits: a copy-on-write file system needs new space even to overwrite; while another process sits on an old snapshot
(stopped in the middle of a read) the log cannot start anew and grows past the reserve; opening as the only process
re-makes the 32 KiB index file (-shm).

Concurrent commits share one SQLite transaction and so one fsync; each is judged in turn and sees those before it.
Judging only reads, so a refused one leaves nothing to undo.
"""

import logging
import os
import sqlite3
import stat
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from shadowvol.clustersync.coordinator import Change, Committed, CoordinatorUnreachable, RecordDamaged, Snapshot
from shadowvol.core.txn import Compare, Entry, Holds, Txn

log = logging.getLogger(__name__)

APPLICATION_ID = 0x53565243  # "SVRC": in the file's header, says that this is shadowvol's record
BACKUP_ID = 0x53564255  # "SVBU": a backup that its maker has marked, so that nobody takes it for the record
FORMAT = 1  # PRAGMA user_version
RESERVE_BYTES = 8 << 20  # of log, and of free pages: a recovery that rewrites the map of the largest volume is 2 MiB
CHECKPOINT_PAGES = 256  # 1 MiB: the log starts anew long before the reserve ends
TOMBSTONES_MAX = 10_000  # deletions remembered for watches; older ones are compacted away
TRIM_EVERY_REVISIONS = 64  # counting tombstones costs a scan of their index
BUSY_LIMIT_MS = 5_000  # wait for another process's transaction; ours take milliseconds
AFTER_EVERY_KEY = "\U0010ffff"  # upper bound of a prefix; a code point that no key contains

_SCHEMA = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL)",
    "CREATE TABLE kv (key TEXT PRIMARY KEY, value BLOB NOT NULL, create_revision INTEGER NOT NULL,"
    " mod_revision INTEGER NOT NULL, checksum BLOB NOT NULL)",
    "CREATE INDEX kv_by_revision ON kv (mod_revision)",
    "CREATE TABLE deleted (key TEXT PRIMARY KEY, revision INTEGER NOT NULL)",
    "CREATE INDEX deleted_by_revision ON deleted (revision)",
    "CREATE TABLE filler (content BLOB NOT NULL)",
    f"INSERT INTO meta VALUES ('format', {FORMAT}), ('revision', 0), ('compacted', 0)",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {FORMAT}",
)

# SQLite's primary result codes that mean: the file could not be used just now, which says nothing about its content.
_UNREACHABLE_CODES = {
    sqlite3.SQLITE_BUSY: "locked by another process",
    sqlite3.SQLITE_LOCKED: "locked by another process",
    sqlite3.SQLITE_FULL: "no space left",
    sqlite3.SQLITE_IOERR: "I/O error",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened",
    sqlite3.SQLITE_READONLY: "read-only, or moved away while in use",
    sqlite3.SQLITE_PERM: "no permission",
    sqlite3.SQLITE_AUTH: "no permission",
    sqlite3.SQLITE_PROTOCOL: "locking failed",
    sqlite3.SQLITE_NOMEM: "out of memory",
}
# Those of them after which a transaction has had no effect for certain: it was refused, or rolled back.
_ROLLED_BACK_CODES = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY}
# ERROR: a table that this format has is missing.
_DAMAGED_CODES = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_FORMAT}


Outcome = Committed | CoordinatorUnreachable | RecordDamaged  # of one transaction of a group


class HistoryCompacted(CoordinatorUnreachable):
    """A watch asked for changes older than the deletions still remembered: read again, watch from that revision."""


def _checksum(key: str, value: bytes) -> bytes:
    return xxhash.xxh3_64_digest(key.encode() + value)


def check_txn(txn: Txn) -> None:
    """Raise ValueError where `txn` breaks the rules of core/txn.py; nothing was changed then."""
    keys = [key for key, _ in txn.puts]
    if len(set(keys)) != len(keys):
        raise ValueError("a transaction puts a key twice")
    for key, value in txn.puts:
        if not isinstance(value, bytes):
            raise ValueError(f"the value of {key} is not bytes")


class StateFile:
    """The open file. Not thread-safe; every method blocks."""

    def __init__(self, path: Path, reserve_bytes: int, tombstones_max: int) -> None:
        self.path = Path(os.path.abspath(path))
        self._log_path = f"{self.path}-wal"
        self._reserve_bytes = reserve_bytes
        self._tombstones_max = tombstones_max
        self._make_file()
        self._connections: list[sqlite3.Connection] = []  # in the order in which they are closed
        try:
            with self._translated():
                self._writer = self._connect("rw")
                self._check_or_create()
                self._reader = self._connect("ro")
                self._seen_version = self._data_version()
                self._fill_reserve()
        except BaseException:
            self.close()
            raise

    # Opening

    def _make_file(self) -> None:
        """Create the file, readable by its owner only (SQLite gives the log the same mode). Refuse half a record."""
        try:
            if os.path.exists(self._log_path) and os.path.getsize(self._log_path) > 0:
                if not self.path.exists() or self.path.stat().st_size == 0:
                    raise RecordDamaged(f"{self.path} is missing or empty, but its log {self._log_path} is there")
            try:
                os.mknod(self.path, 0o600 | stat.S_IFREG)  # not open(): see the rule on descriptors above
            except FileExistsError:
                pass
        except OSError as error:
            raise CoordinatorUnreachable(f"{self.path}: {error.strerror}") from error

    def _connect(self, mode: str) -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"file:{urllib.parse.quote(str(self.path))}?mode={mode}",
            uri=True,
            isolation_level=None,  # BEGIN and COMMIT are written out here
            check_same_thread=False,  # opened by the caller, then used by the thread only
        )
        self._connections.append(connection)
        connection.execute(f"PRAGMA busy_timeout = {BUSY_LIMIT_MS}")
        connection.execute("PRAGMA temp_store = MEMORY")  # no temporary files on a full disk
        return connection

    def _check_or_create(self) -> None:
        fresh = self._check_format()  # before anything is changed: the file may be somebody else's
        self._switch_to_log()
        self._synchronous = ""
        self._set_durable(True)
        for setting in (
            f"wal_autocheckpoint = {CHECKPOINT_PAGES}",
            f"journal_size_limit = {self._reserve_bytes}",
            "secure_delete = OFF",  # Debian's default writes each freed page once more
        ):
            self._writer.execute(f"PRAGMA {setting}")
        if fresh:
            with self._transaction():
                if self._check_format():  # else another process was faster
                    for statement in _SCHEMA:
                        self._writer.execute(statement)
        verdict = self._writer.execute("PRAGMA quick_check(1)").fetchone()[0]
        if verdict != "ok":
            raise RecordDamaged(f"{self.path} is damaged: {' '.join(str(verdict).split())}")
        if self._meta("format") != FORMAT:
            raise RecordDamaged(f"{self.path} is damaged: its header and its content name different formats")

    def _check_format(self) -> bool:
        """True if the file has no content yet; raises if its content is not ours to read."""
        in_transaction = self._writer.in_transaction
        if not in_transaction:
            self._writer.execute("BEGIN")  # one snapshot of the three
        application_id = self._pragma("application_id")
        file_format = self._pragma("user_version")
        table_count = self._writer.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if not in_transaction:
            self._writer.execute("COMMIT")
        if (application_id, file_format, table_count) == (0, 0, 0):
            return True
        if application_id == BACKUP_ID:
            raise RecordDamaged(
                f"{self.path} is a backup: served from it, a volume that was up since may lose writes; "
                "docs/shadowvol.1.md, Backup of the record, says what to do"
            )
        if application_id != APPLICATION_ID:
            raise RecordDamaged(f"{self.path} is an SQLite database, but not a record of shadowvol")
        if file_format > FORMAT:
            raise RecordDamaged(
                f"{self.path} was written by a newer shadowvol (format {file_format}; this one reads {FORMAT}); "
                "use that one"
            )
        if file_format < 1:
            raise RecordDamaged(f"{self.path} is damaged: its format is {file_format}")
        return False

    def _switch_to_log(self) -> None:
        """WAL mode. SQLite does not wait for others in this switch, so we do, as long as for any lock."""
        deadline_s = time.monotonic() + BUSY_LIMIT_MS / 1000
        while True:
            try:
                mode = self._writer.execute("PRAGMA journal_mode = WAL").fetchone()[0]
                break
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline_s:
                    raise
                time.sleep(0.005)
        if mode != "wal":
            raise CoordinatorUnreachable(f"{self.path}: this file system cannot hold it (no shared memory for the log)")

    def _fill_reserve(self) -> None:
        """Top up the free pages and the log. Without it the record works as well, so nothing here stops an open."""
        try:
            if self._writer.execute("SELECT EXISTS (SELECT 1 FROM filler)").fetchone()[0]:
                self._delete_filler()  # a crash left it
            short_of_pages = self.free_bytes() < self._reserve_bytes // 2
            if not short_of_pages and self.log_bytes() >= self._reserve_bytes:
                return
            disk = os.statvfs(self.path.parent)
            if disk.f_bavail * disk.f_frsize < 4 * self._reserve_bytes:
                return  # what little space is left is for what is needed now
            if short_of_pages:
                with self._transaction():
                    self._writer.execute("INSERT INTO filler VALUES (zeroblob(?))", (self._reserve_bytes,))
                self._writer.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            self._delete_filler()
        except (OSError, sqlite3.OperationalError, CoordinatorUnreachable) as error:
            log.warning("%s: no space could be set aside: %s", self.path, error)

    def _delete_filler(self) -> None:
        with self._transaction():
            self._writer.execute("DELETE FROM filler")
            self._extend_log()  # under the write lock, so that nobody else does

    def _extend_log(self) -> None:
        """Write zeroes behind the log's end (never valid frames); written blocks make later fsyncs cheap."""
        log_file = os.open(self._log_path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            end = os.fstat(log_file).st_size
            while end < self._reserve_bytes:
                end += os.pwrite(log_file, bytes(min(1 << 20, self._reserve_bytes - end)), end)
            os.fsync(log_file)
        finally:
            os.close(log_file)

    # Small parts

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_MISUSE) & 0xFF
            if code in _UNREACHABLE_CODES:
                unreachable = CoordinatorUnreachable(f"{self.path}: {_UNREACHABLE_CODES[code]} ({error})")
                unreachable.nothing_changed = code in _ROLLED_BACK_CODES
                raise unreachable from error
            if code == sqlite3.SQLITE_NOTADB:
                raise RecordDamaged(f"{self.path} is not a record of shadowvol, or is damaged: {error}") from error
            if code in _DAMAGED_CODES:
                raise RecordDamaged(f"{self.path} is damaged: {error}") from error
            raise

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """A writing transaction: after the block all of it is there (durably: see _set_durable), or nothing."""
        self._writer.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._writer.execute("COMMIT")
        except BaseException:
            if self._writer.in_transaction:  # SQLite has rolled back by itself after some errors
                self._writer.execute("ROLLBACK")
            raise

    @contextmanager
    def _snapshot(self) -> Iterator[int]:
        """A reading transaction; gives the revision that it sees.

        Every SELECT in it is fetched to its end: one left open, as by an exception whose traceback keeps the cursor
        alive, would hold the old snapshot beyond the ROLLBACK.
        """
        with self._translated():
            self._reader.execute("BEGIN")
            try:
                yield self._meta("revision", self._reader)
            finally:
                if self._reader.in_transaction:
                    self._reader.execute("ROLLBACK")

    def _pragma(self, name: str) -> int:
        return int(self._writer.execute(f"PRAGMA {name}").fetchone()[0])

    def _meta(self, name: str, connection: sqlite3.Connection | None = None) -> int:
        row = (connection or self._writer).execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        if row is None or not isinstance(row[0], int):
            raise RecordDamaged(f"{self.path} is damaged: it does not say its {name}")
        return row[0]

    def _set_meta(self, name: str, value: int) -> None:
        self._writer.execute("UPDATE meta SET value = ? WHERE name = ?", (value, name))

    def _data_version(self) -> int:
        return int(self._reader.execute("PRAGMA data_version").fetchone()[0])

    def _entry(self, key: str, row: Sequence[Any]) -> Entry:
        value, create_revision, mod_revision, checksum = row
        if not isinstance(value, bytes) or _checksum(key, value) != checksum:
            raise RecordDamaged(f"{self.path} is damaged: the value of {key} does not match its checksum")
        return Entry(value, create_revision, mod_revision)

    # Reading

    def read(self, prefix: str) -> Snapshot:
        with self._snapshot() as revision:
            rows = self._reader.execute(
                "SELECT key, value, create_revision, mod_revision, checksum FROM kv"
                " WHERE key >= ? AND key < ? ORDER BY key",
                (prefix, prefix + AFTER_EVERY_KEY),
            ).fetchall()
            return Snapshot(revision, {key: self._entry(key, rest) for key, *rest in rows})

    def changes(self, prefix: str, after_revision: int) -> tuple[list[Change], int]:
        """Last states of the keys changed above `after_revision`, oldest change first, and the revision seen."""
        with self._snapshot() as revision:
            compacted = self._meta("compacted", self._reader)
            if after_revision < compacted:
                raise HistoryCompacted(
                    f"{self.path}: changes after revision {after_revision} are gone (compacted up to {compacted})"
                )
            bounds = (after_revision, prefix, prefix + AFTER_EVERY_KEY)
            changes = [
                Change(key, self._entry(key, rest), rest[2])
                for key, *rest in self._reader.execute(
                    "SELECT key, value, create_revision, mod_revision, checksum FROM kv"
                    " WHERE mod_revision > ? AND key >= ? AND key < ?",
                    bounds,
                ).fetchall()
            ]
            changes += [
                Change(key, None, deleted_revision)
                for key, deleted_revision in self._reader.execute(
                    "SELECT key, revision FROM deleted WHERE revision > ? AND key >= ? AND key < ?", bounds
                ).fetchall()
            ]
            changes.sort(key=lambda change: (change.revision, change.key))
            return changes, revision

    def changed_since_last_asked(self) -> bool:
        """Has anybody, this process included, committed? (PRAGMA data_version: no lock, no read of content.)"""
        with self._translated():
            version = self._data_version()
        changed = version != self._seen_version
        self._seen_version = version
        return changed

    def log_bytes(self) -> int:
        try:
            return os.path.getsize(self._log_path)
        except FileNotFoundError:
            return 0

    def free_bytes(self) -> int:
        with self._translated():
            return self._pragma("freelist_count") * self._pragma("page_size")

    # Writing

    def commit_group(self, txns: Sequence[Txn]) -> list[Outcome]:
        """Judge each in turn, make those that hold durable together. One that meets damage answers for itself.

        Raises CoordinatorUnreachable for all. But when space is short each is tried alone, so that a large one does not
        take small ones down with it: nothing of the group took effect then (it was rolled back).
        """
        try:
            with self._translated():
                return self._commit_together(txns)
        except CoordinatorUnreachable as error:
            cause = error.__cause__
            full = isinstance(cause, sqlite3.Error) and cause.sqlite_errorcode & 0xFF == sqlite3.SQLITE_FULL
            if not full or len(txns) == 1:
                raise
        return [self._commit_alone(txn) for txn in txns]

    def _commit_alone(self, txn: Txn) -> Outcome:
        try:
            with self._translated():
                return self._commit_together([txn])[0]
        except CoordinatorUnreachable as error:
            return error

    def _commit_together(self, txns: Sequence[Txn]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        self._set_durable(not all(txn.relaxed for txn in txns))
        with self._transaction():
            first_revision = revision = self._meta("revision")
            for txn in txns:
                try:
                    ok = all(self._holds(compare) for compare in txn.compares)
                except RecordDamaged as damage:
                    outcomes.append(damage)
                    continue
                if ok and self._apply(txn, revision + 1):
                    revision += 1
                outcomes.append(Committed(ok, revision))
            if revision != first_revision:
                self._set_meta("revision", revision)
                if revision // TRIM_EVERY_REVISIONS != first_revision // TRIM_EVERY_REVISIONS:
                    self._trim_tombstones()
        return outcomes

    def _set_durable(self, durable: bool) -> None:
        """Of the next transactions. SQLite takes this setting between two transactions only."""
        wanted = "FULL" if durable else "NORMAL"
        if wanted != self._synchronous:
            self._writer.execute(f"PRAGMA synchronous = {wanted}")
            self._synchronous = wanted

    def _holds(self, compare: Compare) -> bool:
        row = self._writer.execute(
            "SELECT value, create_revision, mod_revision, checksum FROM kv WHERE key = ?", (compare.key,)
        ).fetchone()
        entry = None if row is None else self._entry(compare.key, row)
        match compare.holds:
            case Holds.PRESENT:
                return entry is not None
            case Holds.ABSENT:
                return entry is None
            case Holds.VALUE:
                return entry is not None and entry.value == compare.value
            case Holds.MOD_REVISION:
                return entry is not None and entry.mod_revision == compare.revision

    def _apply(self, txn: Txn, revision: int) -> bool:
        """Deletes, then puts. False if there was nothing to change (then the revision stays)."""
        changed = bool(txn.puts)
        for key in txn.deletes:
            where, bounds = "key BETWEEN ? AND ?", (key, key)
            if key.endswith("/"):
                where, bounds = "key >= ? AND key < ?", (key, key + AFTER_EVERY_KEY)
            self._writer.execute(
                f"INSERT OR REPLACE INTO deleted SELECT key, {int(revision)} FROM kv WHERE {where}", bounds
            )
            changed |= self._writer.execute(f"DELETE FROM kv WHERE {where}", bounds).rowcount > 0
        for key, value in txn.puts:
            self._writer.execute(
                "INSERT INTO kv VALUES (?1, ?2, ?3, ?3, ?4) ON CONFLICT (key) DO UPDATE SET"
                " value = excluded.value, mod_revision = excluded.mod_revision, checksum = excluded.checksum",
                (key, value, revision, _checksum(key, value)),
            )
            self._writer.execute("DELETE FROM deleted WHERE key = ?", (key,))
        return changed

    def _trim_tombstones(self) -> None:
        """Keep about the last TOMBSTONES_MAX; whole revisions only, so that `compacted` says exactly what is gone."""
        row = self._writer.execute(
            "SELECT revision FROM deleted ORDER BY revision DESC LIMIT 1 OFFSET ?", (self._tombstones_max,)
        ).fetchone()
        if row is not None:
            self._writer.execute("DELETE FROM deleted WHERE revision <= ?", row)
            self._set_meta("compacted", row[0])

    def close(self) -> None:
        """The read-only connection is the last one, so that the log stays (see above)."""
        for connection in self._connections:
            connection.close()
