/* shadowvol's nbdkit filter: executes what the member engine has decided and published, without Python.
 *
 * MECHANISM
 * The member engine (Python, core/member.py) decides where each read and write goes. Here lies a copy of its decision:
 * one byte per region, one flag per zone, both legs' descriptors. A request that these settle is done here, at the speed
 * of nbdkit's own file plugin. Everything else goes on to the plugin with `next->`: regions that disagree, zones that are
 * not in the activity log, holds, FUA, flushes, legs that are not open, every error. This file decides
 * nothing and interprets no error. Its only author is the gate (nbd/filter/cgate.py; nbd/gate.py says in which order),
 * which calls the functions at the end by ctypes: filters are loaded RTLD_GLOBAL, so CDLL(None) finds them.
 *
 * MEANING OF EVERY BYTE
 * table[region], as core/route.py has it, and one bit of our own:
 *     1  READ_TARGET    reads go to the target, else to the source
 *     2  WRITE_SOURCE   a write must reach the source
 *     4  WRITE_TARGET   a write must reach the target; both bits: mirrored
 *     8  SLOW           writes belong to the engine: an undo zone, a hold
 *    16  WHOLE_SLOW     a write that covers a whole region belongs to the engine
 *    32  NOTE           an open window: the range of a write is noted before its first byte, as its copy must be repeated
 *    64  READ_SLOW      reads belong to the engine: a hold of reads; and every region before the state is known
 * logged[zone]: 1, the zone is durably in the activity log: a mirrored write may go on.
 * dirty[zone]: bit of each leg that a write which has ended wrote here since the gate last collected; listed in dirty_zones.
 * notes: ranges of writes to NOTE regions since the gate last collected. Full: such writes are the plugin's.
 * op.kind: FREE; READ and WRITE, I/O of ours is in flight; LET_THROUGH, a write that the plugin does. It owns its range
 * like any other, so that writes have one order on both legs whoever does them. A read that the plugin does needs no op.
 *
 * ORDER OF AN OPERATION
 * 1. Lock. A write waits until no other write, ours or let through, overlaps it (rounded out to `align`). Reads do not.
 * 2. Look at table, zones and legs: ours, or not. Enter the op, and its note if one is due, before its first byte: from
 *    now on the gate's collecting counts a write's zones as written, since a flush that fails must count it. Unlock.
 * 3. The I/O, or `next->`. The lock is never held across either. A mirrored write goes first to the leg that is not
 *    preferred: what somebody has read from the preferred leg is on the other one already.
 * 4. Lock. Mark the zones dirty: a flush that began meanwhile does not count. If all went well and the op was not
 *    taken: count it, free it, wake who waits for the range. Unlock, and answer.
 * 5. Otherwise hand over: call `next->` with the op still in the table. The plugin claims it and has its ticket (one is
 *    made now, or was when the op was taken), so in the engine's eyes it was in flight without a gap. If all went well
 *    the plugin only finishes it. If anything did not, the plugin does all of it again under the ticket, in which
 *    nothing else touches the range: it meets the leg's error, or does what we cannot, and everything from there on
 *    (faults, the leader, what the application is told) goes the one way that it has.
 *
 * TAKING
 * A drain of the engine must wait for what we have in flight. The gate first publishes, so that nothing new begins by the
 * old byte, then takes: each op of ours in the range is marked, and the engine makes a ticket of it. Nobody blocks: the
 * op's own thread comes to the plugin at its end (step 5), which ends the drain.
 *
 * LOCK
 * One mutex and one condition variable. Python calls with its GIL held and waits for the mutex only; no thread that has
 * the mutex wants the GIL, or does I/O.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <nbdkit-filter.h>

#define INTERFACE 3                    /* what cgate.py expects of this file; change both */
#define OPS_MAX 1024                   /* a write waits for a free one, a read goes to the plugin */
#define NOTES_MAX 16384                /* while a window is open: collected every 250 ms, or 50 when they are many */
#define BOUNCE_BYTES (1 << 20)         /* larger O_DIRECT requests are done in pieces */
#define DIRECT_ALIGN 4096              /* of memory, for O_DIRECT: no medium asks for more */
#define SUB_BITS 3                     /* buckets of latencies: core/latency.py */
#define BUCKET_COUNT 320

/* The harness of the tests delays I/O, and leaves this rule out, by defining these. */
#ifndef SHADOWVOL_PREAD
#define SHADOWVOL_PREAD pread
#define SHADOWVOL_PWRITE pwrite
#endif
#ifndef SHADOWVOL_OVERLAP
#define SHADOWVOL_OVERLAP(op, first, last) ((op)->first < (last) && (first) < (op)->last)
#endif

enum { READ_TARGET = 1, WRITE_SOURCE = 2, SLOW = 8, WHOLE_SLOW = 16, NOTE = 32, READ_SLOW = 64 };
enum { WRITE_BITS = 2 | 4 | SLOW | WHOLE_SLOW | NOTE, BOTH = 3 };
enum kind { FREE, READ, WRITE, LET_THROUGH };
enum handed { NOT_HANDED, DONE, TO_DO };
enum what { DATA, TRIM, ZERO };

struct op {
  uint8_t kind, legs, taken, handed;
  uint64_t start, end;                 /* bytes [start, end) */
  uint64_t first, last;                /* the same, rounded out */
};

struct leg {
  int fd, direct_fd;                   /* -1: not open; not O_DIRECT */
  uint32_t align;                      /* of the O_DIRECT descriptor */
  uint64_t direct_end;                 /* the part after it goes through fd, by the plugin */
  bool can_punch;                      /* a file: punching makes a hole that reads as zeroes */
};

struct counters {                      /* by kind: 0 reads, 1 writes; only of what ended here */
  uint64_t ended[2], bytes[2], longest_ns[2], handed_over[2], let_through[2], took_ns[2], in_flight;
  uint64_t buckets[2][BUCKET_COUNT];
};

struct taken { uint64_t start, end; uint32_t op; uint8_t kind, legs, pad[2]; };

struct range { uint64_t start, end; };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t freed = PTHREAD_COND_INITIALIZER;
static unsigned waiting;               /* writes that wait for `freed` */
static struct op ops[OPS_MAX];
static unsigned ops_end;               /* no op at or after it is in use */
static struct leg legs[2] = { { .fd = -1, .direct_fd = -1 }, { .fd = -1, .direct_fd = -1 } };
static struct counters counters;
static uint8_t *table, *logged, *dirty;  /* NULL: nobody is there, everything goes to the plugin */
static uint32_t *dirty_zones, dirty_count;
static struct range notes[NOTES_MAX];
static uint32_t note_count;
static unsigned region_shift, zone_shift;
static uint64_t size_bytes, align = 1;
static int preferred;
static bool hold_reads, hold_writes;

static __thread struct op *handing;    /* what this thread's `next->` hands over, until it is claimed */
static __thread int64_t begun_ns;
static pthread_key_t bounce_key;

static int64_t
now_ns (void)
{
  struct timespec now;
  clock_gettime (CLOCK_MONOTONIC, &now);
  return now.tv_sec * INT64_C (1000000000) + now.tv_nsec;
}

static unsigned
bucket_of (uint64_t ns)
{
  if (ns < 1 << SUB_BITS)
    return ns;
  unsigned power = 63 - __builtin_clzll (ns) - SUB_BITS;
  uint64_t bucket = ((uint64_t) power << SUB_BITS) + (ns >> power);
  return bucket < BUCKET_COUNT ? bucket : BUCKET_COUNT - 1;
}

/* ---- with the lock: looking, entering, leaving ---- */

static bool
leg_serves (int which, uint64_t start, uint64_t end, enum what what)
{
  const struct leg *leg = &legs[which];
  if (leg->fd < 0)
    return false;
  if (what != DATA)
    return leg->can_punch;
  return leg->direct_fd < 0
    || ((start | end) % leg->align == 0 && end <= leg->direct_end);
}

/* The legs that serve a read, as a bit; 0: the plugin's. */
static uint8_t
settled_read (uint64_t start, uint64_t end)
{
  if (table == NULL || hold_reads)
    return 0;
  uint64_t lo = start >> region_shift, hi = (end - 1) >> region_shift;
  uint8_t byte = table[lo] & (READ_TARGET | READ_SLOW);
  for (uint64_t region = lo + 1; region <= hi; region++)
    if ((table[region] & (READ_TARGET | READ_SLOW)) != byte)
      return 0;
  if ((byte & READ_SLOW) || !leg_serves (byte & READ_TARGET, start, end, DATA))
    return 0;
  return 1 << (byte & READ_TARGET);
}

/* The legs that a write must reach; 0: the plugin's. `*due`: it is to be noted. */
static uint8_t
settled_write (uint64_t start, uint64_t end, enum what what, bool *due)
{
  uint64_t lo = start >> region_shift, hi = (end - 1) >> region_shift;
  uint8_t byte = table[lo] & WRITE_BITS;
  *due = byte & NOTE;
  if (hold_writes || (byte & SLOW) || (*due && note_count == NOTES_MAX))
    return 0;
  for (uint64_t region = lo + 1; region <= hi; region++)
    if ((table[region] & WRITE_BITS) != byte)
      return 0;
  if (byte & WHOLE_SLOW) {
    uint64_t whole_lo = (start + (UINT64_C (1) << region_shift) - 1) >> region_shift;
    if ((end == size_bytes ? hi + 1 : end >> region_shift) > whole_lo)
      return 0;
  }
  uint8_t both = byte / WRITE_SOURCE & BOTH;
  if (both == BOTH)
    for (uint64_t zone = start >> zone_shift; zone <= (end - 1) >> zone_shift; zone++)
      if (!logged[zone])
        return 0;
  for (int which = 0; which < 2; which++)
    if ((both & (1 << which)) && !leg_serves (which, start, end, what))
      return 0;
  return both;
}

/* One that goes on where the last one ended makes no new note. */
static void
note (uint64_t start, uint64_t end)
{
  if (note_count > 0 && notes[note_count - 1].end == start)
    notes[note_count - 1].end = end;
  else
    notes[note_count++] = (struct range) { start, end };
}

static void
mark_dirty (const struct op *op)
{
  for (uint64_t zone = op->start >> zone_shift; zone <= (op->end - 1) >> zone_shift; zone++) {
    if (!dirty[zone])
      dirty_zones[dirty_count++] = zone;
    dirty[zone] |= op->legs;
  }
}

/* A free op, or NULL; for a write, NULL also while another write owns a part of the range. */
static struct op *
free_op (enum kind kind, uint64_t first, uint64_t last)
{
  struct op *found = NULL;
  for (struct op *op = ops; op < ops + ops_end; op++) {
    if (op->kind == FREE) {
      if (found == NULL)
        found = op;
      if (kind == READ)
        break;
    }
    else if (kind == WRITE && op->kind != READ && SHADOWVOL_OVERLAP (op, first, last))
      return NULL;
  }
  if (found == NULL && ops_end < OPS_MAX)
    found = &ops[ops_end++];
  return found;
}

static void
enter (struct op *op, enum kind kind, uint8_t which, uint64_t start, uint64_t end,
       uint64_t first, uint64_t last)
{
  *op = (struct op) { .kind = kind, .legs = which, .start = start, .end = end, .first = first, .last = last };
}

static void
leave (struct op *op)
{
  bool wake = op->kind != READ && waiting;
  op->kind = FREE;
  while (ops_end > 0 && ops[ops_end - 1].kind == FREE)
    ops_end--;
  if (wake)
    pthread_cond_broadcast (&freed);
}

/* Step 4, with the lock: true when nothing is left to do. */
static bool
settle (struct op *op, bool ok)
{
  int kind = op->kind == READ ? 0 : 1;
  if (op->kind == WRITE)
    mark_dirty (op);
  if (!ok || op->taken) {
    op->handed = ok ? DONE : TO_DO;
    counters.handed_over[kind]++;
    return false;
  }
  uint64_t took_ns = now_ns () - begun_ns;
  counters.ended[kind]++;
  counters.bytes[kind] += op->end - op->start;
  counters.took_ns[kind] += took_ns;
  counters.buckets[kind][bucket_of (took_ns)]++;
  if (took_ns > counters.longest_ns[kind])
    counters.longest_ns[kind] = took_ns;
  leave (op);
  return true;
}

/* ---- without the lock: the I/O. False: something was not as it should be, whatever it was ---- */

static bool
full_read (int fd, char *buffer, uint64_t count, uint64_t offset)
{
  while (count > 0) {
    ssize_t got = SHADOWVOL_PREAD (fd, buffer, count, offset);
    if (got < 0 && errno == EINTR)
      continue;
    if (got <= 0)
      return false;
    buffer += got, count -= got, offset += got;
  }
  return true;
}

static bool
full_write (int fd, const char *buffer, uint64_t count, uint64_t offset)
{
  while (count > 0) {
    ssize_t wrote = SHADOWVOL_PWRITE (fd, buffer, count, offset);
    if (wrote < 0 && errno == EINTR)
      continue;
    if (wrote <= 0)
      return false;
    buffer += wrote, count -= wrote, offset += wrote;
  }
  return true;
}

/* This thread's aligned buffer; freed with the thread. NULL: no memory. */
static char *
bounce (void)
{
  char *buffer = pthread_getspecific (bounce_key);
  if (buffer == NULL && posix_memalign ((void **) &buffer, DIRECT_ALIGN, BOUNCE_BYTES) == 0)
    pthread_setspecific (bounce_key, buffer);
  return buffer;
}

static bool
leg_read (const struct leg *leg, char *buffer, uint64_t count, uint64_t offset)
{
  if (leg->direct_fd < 0)
    return full_read (leg->fd, buffer, count, offset);
  if ((uintptr_t) buffer % DIRECT_ALIGN == 0)
    return full_read (leg->direct_fd, buffer, count, offset);
  char *aligned = bounce ();
  while (aligned != NULL && count > 0) {
    uint64_t piece = count < BOUNCE_BYTES ? count : BOUNCE_BYTES;
    if (!full_read (leg->direct_fd, aligned, piece, offset))
      return false;
    memcpy (buffer, aligned, piece);
    buffer += piece, count -= piece, offset += piece;
  }
  return aligned != NULL;
}

static bool
leg_write (const struct leg *leg, const char *buffer, uint64_t count, uint64_t offset)
{
  if (leg->direct_fd < 0)
    return full_write (leg->fd, buffer, count, offset);
  if ((uintptr_t) buffer % DIRECT_ALIGN == 0)
    return full_write (leg->direct_fd, buffer, count, offset);
  char *aligned = bounce ();
  while (aligned != NULL && count > 0) {
    uint64_t piece = count < BOUNCE_BYTES ? count : BOUNCE_BYTES;
    memcpy (aligned, buffer, piece);
    if (!full_write (leg->direct_fd, aligned, piece, offset))
      return false;
    buffer += piece, count -= piece, offset += piece;
  }
  return aligned != NULL;
}

static bool
leg_punch (const struct leg *leg, uint64_t count, uint64_t offset)
{
  int result;
  do
    result = fallocate (leg->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, count);
  while (result < 0 && errno == EINTR);
  return result == 0;
}

/* ---- nbdkit's callbacks ---- */

static int
filter_pread (nbdkit_next *next, void *handle, void *buffer, uint32_t count, uint64_t offset,
              uint32_t flags, int *err)
{
  begun_ns = now_ns ();
  pthread_mutex_lock (&lock);
  uint8_t which = settled_read (offset, offset + count);
  struct op *op = which ? free_op (READ, 0, 0) : NULL;
  if (op != NULL)
    enter (op, READ, which, offset, offset + count, offset, offset + count);
  else
    counters.let_through[0]++;
  struct leg leg = legs[which >> 1];
  pthread_mutex_unlock (&lock);
  if (op == NULL)
    return next->pread (next, buffer, count, offset, flags, err);

  bool ok = leg_read (&leg, buffer, count, offset);
  pthread_mutex_lock (&lock);
  bool settled = settle (op, ok);
  pthread_mutex_unlock (&lock);
  if (settled)
    return 0;
  handing = op;
  int result = next->pread (next, buffer, count, offset, flags, err);
  handing = NULL;
  pthread_mutex_lock (&lock);
  leave (op);
  pthread_mutex_unlock (&lock);
  return result;
}

static int
go_on (nbdkit_next *next, enum what what, const void *buffer, uint32_t count, uint64_t offset,
       uint32_t flags, int *err)
{
  switch (what) {
  case DATA: return next->pwrite (next, buffer, count, offset, flags, err);
  case TRIM: return next->trim (next, count, offset, flags, err);
  default:   return next->zero (next, count, offset, flags, err);
  }
}

/* Writes, trims and zeroes. `ours`: the flags are none that only the plugin understands. */
static int
write_op (nbdkit_next *next, enum what what, bool ours, const void *buffer, uint32_t count,
          uint64_t offset, uint32_t flags, int *err)
{
  begun_ns = now_ns ();
  uint64_t end = offset + count;
  struct op *op;
  pthread_mutex_lock (&lock);
  if (table == NULL) {
    pthread_mutex_unlock (&lock);
    return go_on (next, what, buffer, count, offset, flags, err);
  }
  uint64_t first, last;
  for (;;) {
    first = offset - offset % align;
    last = (end + align - 1) / align * align;
    op = free_op (WRITE, first, last);
    if (op != NULL)
      break;
    waiting++;
    pthread_cond_wait (&freed, &lock);
    waiting--;
  }
  bool due = false;
  uint8_t which = ours ? settled_write (offset, end, what, &due) : 0;
  if (which && due)
    note (offset, end);
  enter (op, which ? WRITE : LET_THROUGH, which, offset, end, first, last);
  if (!which)
    counters.let_through[1]++;
  struct leg both[2] = { legs[0], legs[1] };
  int order[2] = { 1 - preferred, preferred };
  pthread_mutex_unlock (&lock);

  if (which) {
    bool ok = true;
    for (int turn = 0; turn < 2 && ok; turn++) {
      const struct leg *leg = &both[order[turn]];
      if (!(which & (1 << order[turn])))
        continue;
      ok = what == DATA ? leg_write (leg, buffer, count, offset) : leg_punch (leg, count, offset);
    }
    pthread_mutex_lock (&lock);
    bool settled = settle (op, ok);
    pthread_mutex_unlock (&lock);
    if (settled)
      return 0;
    handing = op;
  }
  int result = go_on (next, what, buffer, count, offset, flags, err);
  handing = NULL;
  pthread_mutex_lock (&lock);
  leave (op);
  pthread_mutex_unlock (&lock);
  return result;
}

static int
filter_pwrite (nbdkit_next *next, void *handle, const void *buffer, uint32_t count, uint64_t offset,
               uint32_t flags, int *err)
{
  return write_op (next, DATA, flags == 0, buffer, count, offset, flags, err);
}

static int
filter_trim (nbdkit_next *next, void *handle, uint32_t count, uint64_t offset, uint32_t flags, int *err)
{
  return write_op (next, TRIM, flags == 0, NULL, count, offset, flags, err);
}

static int
filter_zero (nbdkit_next *next, void *handle, uint32_t count, uint64_t offset, uint32_t flags, int *err)
{
  return write_op (next, ZERO, flags == NBDKIT_FLAG_MAY_TRIM, NULL, count, offset, flags, err);
}

static void
filter_load (void)
{
  pthread_key_create (&bounce_key, free);
}

static struct nbdkit_filter filter = {
  .name = "shadowvol",
  .longname = "shadowvol fast path",
  .load = filter_load,
  .pread = filter_pread,
  .pwrite = filter_pwrite,
  .trim = filter_trim,
  .zero = filter_zero,
};

NBDKIT_REGISTER_FILTER (filter)

/* ---- the gate's functions: called by Python with the data path's lock ---- */

#define GATE __attribute__ ((visibility ("default")))

GATE int shadowvol_interface (void) { return INTERFACE; }

/* Once, before the first request. Sizes are powers of two but for the volume's. -1: no memory. */
GATE int
shadowvol_start (uint64_t size, uint64_t region_bytes, uint64_t zone_bytes)
{
  uint64_t regions = (size + region_bytes - 1) / region_bytes, zones = (size + zone_bytes - 1) / zone_bytes;
  uint8_t *bytes = malloc (regions);
  logged = calloc (zones, 1);
  dirty = calloc (zones, 1);
  dirty_zones = calloc (zones, sizeof *dirty_zones);
  if (bytes == NULL || logged == NULL || dirty == NULL || dirty_zones == NULL)
    return -1;
  memset (bytes, SLOW | READ_SLOW, regions);
  pthread_mutex_lock (&lock);
  size_bytes = size;
  region_shift = __builtin_ctzll (region_bytes);
  zone_shift = __builtin_ctzll (zone_bytes);
  table = bytes;
  pthread_mutex_unlock (&lock);
  return 0;
}

/* `bytes` for the regions from `region` on. */
GATE void
shadowvol_publish (uint64_t region, const uint8_t *bytes, uint64_t count)
{
  pthread_mutex_lock (&lock);
  memcpy (table + region, bytes, count);
  pthread_mutex_unlock (&lock);
}

/* What holds for all regions: who is written last, and whether everything is held. */
GATE void
shadowvol_hold (int preferred_leg, int reads, int writes)
{
  pthread_mutex_lock (&lock);
  preferred = preferred_leg;
  hold_reads = reads, hold_writes = writes;
  pthread_mutex_unlock (&lock);
}

GATE void
shadowvol_log_zones (const uint32_t *zones, uint32_t count, int on)
{
  pthread_mutex_lock (&lock);
  for (uint32_t index = 0; index < count; index++)
    logged[zones[index]] = on;
  pthread_mutex_unlock (&lock);
}

/* (zone << 2 | legs) of every zone written since the last call, or being written; their number. */
GATE uint32_t
shadowvol_collect (uint32_t *out)
{
  pthread_mutex_lock (&lock);
  for (struct op *op = ops; op < ops + ops_end; op++)
    if (op->kind == WRITE)
      mark_dirty (op);
  uint32_t count = dirty_count;
  for (uint32_t index = 0; index < count; index++) {
    uint32_t zone = dirty_zones[index];
    out[index] = zone << 2 | dirty[zone];
    dirty[zone] = 0;
  }
  dirty_count = 0;
  pthread_mutex_unlock (&lock);
  return count;
}

/* The notes since the last call, into `out`, which has room for NOTES_MAX; their number. */
GATE uint32_t
shadowvol_collect_notes (struct range *out)
{
  pthread_mutex_lock (&lock);
  uint32_t count = note_count;
  memcpy (out, notes, count * sizeof *out);
  note_count = 0;
  pthread_mutex_unlock (&lock);
  return count;
}

/* Mark what is in flight in [start, end) as taken; `out` has room for OPS_MAX. How many. */
GATE uint32_t
shadowvol_take (uint64_t start, uint64_t end, int reads, int writes, struct taken *out)
{
  uint32_t count = 0;
  pthread_mutex_lock (&lock);
  for (struct op *op = ops; op < ops + ops_end; op++) {
    bool wanted = (op->kind == READ && reads) || (op->kind == WRITE && writes);
    if (!wanted || op->taken || op->first >= end || start >= op->last)
      continue;
    op->taken = 1;
    out[count++] = (struct taken) { op->start, op->end, op - ops, op->kind == WRITE, op->legs, { 0 } };
  }
  pthread_mutex_unlock (&lock);
  return count;
}

/* By the plugin, on the request's thread. 0: nothing is handed over. Else 1 | taken << 1 | done << 2 | legs << 3 | op << 8. */
GATE uint32_t
shadowvol_claim (void)
{
  struct op *op = handing;
  if (op == NULL)
    return 0;
  handing = NULL;
  pthread_mutex_lock (&lock);
  uint32_t claimed = 1 | op->taken << 1 | (op->handed == DONE) << 2 | op->legs << 3 | (uint32_t) (op - ops) << 8;
  if (op->kind == WRITE)
    op->kind = LET_THROUGH;
  else
    op->taken = 1; /* a read that is the plugin's now: nobody takes it again */
  op->legs = 0;
  pthread_mutex_unlock (&lock);
  return claimed;
}

/* When this thread's request came. */
GATE int64_t shadowvol_begun_ns (void) { return begun_ns; }

GATE void
shadowvol_align (uint64_t bytes)
{
  pthread_mutex_lock (&lock);
  align = bytes;
  pthread_mutex_unlock (&lock);
}

GATE void
shadowvol_open_leg (int which, int fd, int direct_fd, uint32_t leg_align, uint64_t direct_end, int can_punch)
{
  pthread_mutex_lock (&lock);
  legs[which] = (struct leg) { fd, direct_fd, leg_align, direct_end, can_punch };
  pthread_mutex_unlock (&lock);
}

/* 0: I/O is in flight on it. 1: it is not used from now on. */
GATE int
shadowvol_close_leg (int which)
{
  int used = 0;
  pthread_mutex_lock (&lock);
  for (struct op *op = ops; op < ops + ops_end; op++)
    used |= op->kind != FREE && (op->legs & (1 << which));
  if (!used)
    legs[which].fd = -1;
  pthread_mutex_unlock (&lock);
  return !used;
}

/* A copy of the counters; the longest times start again where `reset`. */
GATE void
shadowvol_counters (struct counters *out, int reset)
{
  pthread_mutex_lock (&lock);
  counters.in_flight = 0;
  for (struct op *op = ops; op < ops + ops_end; op++)
    counters.in_flight += (op->kind == READ || op->kind == WRITE) && !op->taken;
  *out = counters;
  if (reset)
    counters.longest_ns[0] = counters.longest_ns[1] = 0;
  pthread_mutex_unlock (&lock);
}
