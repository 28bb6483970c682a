/* The C filter alone, against an exact checker: clients call its callbacks from many threads, a stand-in for the plugin
 * obeys the same rules as the member's data path, and an author flips regions as fast as it can.
 *
 * Usage: filter_harness DIRECTORY SEED FLIPS [OMIT]. Exit 0: all is well. 1: a rule was broken, and which one is printed.
 * OMIT: "drain" (the author does not wait for what was in flight), "take" (it does not even ask), "notes" (it does not
 * collect them). Compiled with -DOMIT_OVERLAP overlapping writes are not serialised. tests/nbd/test_filter_harness.py builds and runs all of them.
 *
 * What is checked
 * - a read returns no less than what was acknowledged, or read by somebody, before it began, and no more than was begun;
 * - where a region is ok on both legs, they are equal whenever its writes are held and drained;
 * - a write that was answered is known to the author as dirty, on each leg that it was to reach;
 * - a write that was answered in a region whose writes are noted is noted;
 * - nothing is mirrored in a zone that has left the log;
 * - every ticket ends, every leg can be let go, and counters tell what was done.
 * I/O of the filter is delayed, cut short, interrupted and failed at random (filter_disturbed.h).
 */

#define _GNU_SOURCE
#include <stdatomic.h>
#include <stdio.h>
#include "filter_disturbed.h"
#ifdef OMIT_OVERLAP
#define SHADOWVOL_OVERLAP(op, first, last) ((void) (first), (void) (last), false)
#endif
#include "filter.c"

enum { BLOCK = 4096, REGION = 16 * BLOCK, ZONE = 4 * REGION, REGIONS = 16, BLOCKS = REGIONS * REGION / BLOCK };
enum { TAKEN_MIN = 20, ZONES = REGIONS * REGION / ZONE, CLIENTS = 8, SHARED_BLOCKS = 4, BLOCKS_MAX = 24, SIZE = REGIONS * REGION };

static void
broken (const char *rule, uint64_t place)
{
  fprintf (stderr, "broken: %s at %lu\n", rule, (unsigned long) place);
  _exit (1);
}

/* ---- the author: what the engine and the gate do, with one lock ---- */

static pthread_mutex_t author = PTHREAD_MUTEX_INITIALIZER; /* the data path's lock */
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static int leg_fds[2];
static uint8_t state[REGIONS];         /* as core/route.py */
static bool held_reads[REGIONS], held_writes[REGIONS];
static bool zone_logged[ZONES];
static uint64_t clock_now, written_at[2][ZONES], noted_at[BLOCKS];
static unsigned flips_of[REGIONS];
static unsigned zone_writes[ZONES];    /* by the plugin, in flight */
static struct ticket { bool used, is_write; uint64_t start, end; } tickets[OPS_MAX];
static int ticket_of_op[OPS_MAX];
static bool omit_drain, omit_take, omit_notes;
static atomic_ulong adopted, taken_count;

static void
written (uint64_t zone, unsigned bits)
{
  clock_now++;
  for (int leg = 0; leg < 2; leg++)
    if (bits & (1 << leg))
      written_at[leg][zone] = clock_now;
}

static void
noted (uint64_t start, uint64_t end)
{
  clock_now++;
  for (uint64_t block = start / BLOCK; block <= (end - 1) / BLOCK; block++)
    noted_at[block] = clock_now;
}

static void
collect (void)
{
  static struct range notes_now[NOTES_MAX];
  uint32_t notes_told = omit_notes ? 0 : shadowvol_collect_notes (notes_now);
  for (uint32_t index = 0; index < notes_told; index++)
    noted (notes_now[index].start, notes_now[index].end);
  uint32_t zones[ZONES];
  uint32_t count = shadowvol_collect (zones);
  for (uint32_t index = 0; index < count; index++)
    written (zones[index] >> 2, zones[index] & BOTH);
  pthread_mutex_lock (&lock);
  for (struct op *op = ops; op < ops + ops_end; op++)
    if (op->kind == WRITE && op->legs == BOTH && !(zone_logged[op->start / ZONE] && zone_logged[(op->end - 1) / ZONE]))
      broken ("a mirrored write in a zone that left the log", op->start / ZONE);
  pthread_mutex_unlock (&lock);
}

static void
publish (unsigned region)
{
  uint8_t byte = state[region] | (held_writes[region] ? SLOW : 0) | (held_reads[region] ? READ_SLOW : 0);
  shadowvol_publish (region, &byte, 1);
}

static int
new_ticket (uint64_t start, uint64_t end, bool is_write)
{
  for (int number = 0; number < OPS_MAX; number++)
    if (!tickets[number].used) {
      tickets[number] = (struct ticket) { true, is_write, start, end };
      return number;
    }
  broken ("tickets do not end", start);
  return -1;
}

static bool
in_flight (uint64_t start, uint64_t end, bool reads, bool writes)
{
  for (int number = 0; number < OPS_MAX; number++) {
    struct ticket *ticket = &tickets[number];
    if (ticket->used && (ticket->is_write ? writes : reads) && ticket->start < end && start < ticket->end)
      return true;
  }
  return false;
}

/* Returns when all that was in flight there has ended. New I/O of these kinds is held. */
static void
drain (unsigned region, bool reads, bool writes)
{
  static struct taken out[OPS_MAX];
  uint64_t start = (uint64_t) region * REGION, end = start + REGION;
  uint32_t count = omit_take ? 0 : shadowvol_take (start, end, reads, writes, out);
  taken_count += count;
  for (uint32_t index = 0; index < count; index++)
    ticket_of_op[out[index].op] = new_ticket (out[index].start, out[index].end, out[index].kind);
  while (!omit_drain && in_flight (start, end, reads, writes))
    pthread_cond_wait (&changed, &author);
}

static void
compare (unsigned region)
{
  char one[REGION], other[REGION];
  if (pread (leg_fds[0], one, REGION, (off_t) region * REGION) != REGION
      || pread (leg_fds[1], other, REGION, (off_t) region * REGION) != REGION)
    broken ("a leg cannot be read", region);
  if (memcmp (one, other, REGION) != 0)
    broken ("unequal legs of a region that is ok on both", region);
}

/* One flip: one leg -> both -> (the other one is read) -> one leg. */
static void
flip (unsigned region)
{
  uint8_t now = state[region], read = now & READ_TARGET;
  pthread_mutex_lock (&author);
  collect ();
  flips_of[region]++;
  held_writes[region] = true;
  publish (region);
  drain (region, false, true);
  if ((now & (2 | 4)) != (2 | 4)) {     /* copy, then write and trust both */
    char copy[REGION];
    if (pread (leg_fds[read], copy, REGION, (off_t) region * REGION) != REGION
        || pwrite (leg_fds[1 - read], copy, REGION, (off_t) region * REGION) != REGION)
      broken ("a leg cannot be copied", region);
    state[region] = 2 | 4 | read | (below (2) ? NOTE : 0);
  }
  else if (below (2)) {                 /* reads move; the writes wait until none is on its way to the old leg */
    compare (region);
    state[region] ^= READ_TARGET;
    publish (region);
    drain (region, true, false);
  }
  else {                                /* the leg that is not read is let go */
    compare (region);
    state[region] = read ? 4 | READ_TARGET : 2;
  }
  held_writes[region] = false;
  flips_of[region]++;                   /* its middle, where others had the lock, is over */
  publish (region);
  pthread_cond_broadcast (&changed);
  pthread_mutex_unlock (&author);
}

/* The cleaning of the log: nbd/gate.py, 4. */
static void
clean (uint64_t zone)
{
  uint32_t index = zone;
  pthread_mutex_lock (&author);
  collect ();
  uint64_t before = clock_now;
  shadowvol_log_zones (&index, 1, 0);
  collect ();
  bool idle = written_at[0][zone] <= before && written_at[1][zone] <= before && !zone_writes[zone];
  if (idle)
    zone_logged[zone] = false;
  else
    shadowvol_log_zones (&index, 1, zone_logged[zone]);
  pthread_mutex_unlock (&author);
}

/* ---- the plugin: what the data path does ---- */

static int
plugin_io (bool is_write, char *buffer, uint32_t count, uint64_t offset)
{
  uint64_t end = offset + count, lo = offset / REGION, hi = (end - 1) / REGION;
  unsigned touched = 0;
  uint8_t now[REGIONS];
  int preferred_now;
  pthread_mutex_lock (&author);
  uint32_t claimed = shadowvol_claim ();
  int number;
  if (claimed & 2)
    number = ticket_of_op[claimed >> 8];
  else {
    for (bool held = !claimed; held;) {
      held = false;
      for (uint64_t region = lo; region <= hi; region++)
        held |= is_write ? held_writes[region] : held_reads[region];
      if (held)
        pthread_cond_wait (&changed, &author);
    }
    number = new_ticket (offset, end, is_write);
  }
  adopted += claimed & 1;
  preferred_now = preferred;
  for (uint64_t region = lo; region <= hi; region++) {
    now[region] = state[region];
    if (claimed)                        /* one run, and its legs are those of its admission */
      now[region] = is_write ? (claimed >> 3 & BOTH) * 2 : (claimed >> 3 & BOTH) - 1;
    touched |= now[region] / 2 & BOTH;
  }
  if (is_write)
    for (uint64_t zone = offset / ZONE; zone <= (end - 1) / ZONE; zone++) {
      uint32_t index = zone;
      zone_writes[zone]++;
      written (zone, touched);
      noted (offset, end);
      if (touched == BOTH) {            /* made durable, as it were */
        zone_logged[zone] = true;
        shadowvol_log_zones (&index, 1, 1);
      }
    }
  pthread_mutex_unlock (&author);
  for (uint64_t region = lo; region <= hi && !(claimed & 4); region++) {
    uint64_t first = region == lo ? offset : region * REGION, last = region == hi ? end : (region + 1) * REGION;
    ssize_t length = last - first;
    char *piece = buffer + (first - offset);
    if (!is_write && pread (leg_fds[now[region] & READ_TARGET], piece, length, first) != length)
      broken ("the plugin cannot read", first);
    for (int turn = 0; is_write && turn < 2; turn++) {
      int leg = turn ? preferred_now : 1 - preferred_now;
      if ((now[region] & (2 << leg)) && pwrite (leg_fds[leg], piece, length, first) != length)
        broken ("the plugin cannot write", first);
    }
  }
  pthread_mutex_lock (&author);
  tickets[number].used = false;
  if (is_write)
    for (uint64_t zone = offset / ZONE; zone <= (end - 1) / ZONE; zone++) {
      zone_writes[zone]--;
      written (zone, touched);
    }
  pthread_cond_broadcast (&changed);
  pthread_mutex_unlock (&author);
  return 0;
}

static int
plugin_pread (nbdkit_next *next, void *buffer, uint32_t count, uint64_t offset, uint32_t flags, int *err)
{
  return plugin_io (false, buffer, count, offset);
}

static int
plugin_pwrite (nbdkit_next *next, const void *buffer, uint32_t count, uint64_t offset, uint32_t flags, int *err)
{
  return plugin_io (true, (char *) buffer, count, offset);
}

static struct nbdkit_next_ops plugin = { .pread = plugin_pread, .pwrite = plugin_pwrite };

/* ---- the clients: block b belongs to client b % CLIENTS, the first ones of each region to all ---- */

static atomic_ulong begun[BLOCKS], answered[BLOCKS], seen[BLOCKS];
static atomic_bool over;
static atomic_ulong operations;

/* A block is full of one word: its version, and a check, for a read beside a write may see half of a word. */
static unsigned long
word_of (unsigned long version)
{
  return version << 24 | (version * 2654435761u >> 8 & 0xffffff);
}

static bool
torn (unsigned long word)
{
  return word != word_of (word >> 24);
}

static bool
shared (unsigned block)
{
  return block % (REGION / BLOCK) < SHARED_BLOCKS;
}

static void
raise_to (atomic_ulong *value, unsigned long least)
{
  unsigned long now = atomic_load (value);
  while (now < least && !atomic_compare_exchange_weak (value, &now, least))
    ;
}

static void
client_write (unsigned self)
{
  static atomic_ulong versions;
  char buffer[BLOCKS_MAX * BLOCK];
  unsigned block = below (BLOCKS), count = 1;
  bool contend = shared (block);
  if (contend)                          /* anybody's, and several blocks, at any byte */
    count = 1 + below (SHARED_BLOCKS - block % (REGION / BLOCK));
  else
    block = block - block % CLIENTS + self;
  if (!contend && shared (block))
    return;
  unsigned long version = ++versions;
  unsigned long word = word_of (version);
  for (unsigned index = 0; index < count * BLOCK / sizeof word; index++)
    memcpy (buffer + index * sizeof word, &word, sizeof word);
  if (!contend)
    begun[block] = version;
  pthread_mutex_lock (&author);
  uint64_t before = ++clock_now;
  unsigned region = block / (REGION / BLOCK), flips_before = flips_of[region];
  bool due = state[region] & NOTE;
  pthread_mutex_unlock (&author);
  int err = 0;
  if (filter_pwrite (&plugin, NULL, buffer, count * BLOCK, (uint64_t) block * BLOCK, 0, &err) != 0)
    broken ("a write failed", block);
  if (!contend)
    raise_to (&answered[block], version);
  pthread_mutex_lock (&author);
  collect ();
  uint64_t zone = (uint64_t) block * BLOCK / ZONE;
  if (written_at[0][zone] <= before && written_at[1][zone] <= before)
    broken ("an answered write that the author does not know of", zone);
  for (unsigned index = block; index < block + count; index++)
    if (due && flips_of[region] == flips_before && noted_at[index] <= before)
      broken ("an answered write that is not noted", index);
  pthread_mutex_unlock (&author);
}

static void
client_read (void)
{
  char buffer[BLOCKS_MAX * BLOCK];
  unsigned count = 1 + below (BLOCKS_MAX), block = below (BLOCKS - count);
  unsigned long least[BLOCKS_MAX];
  for (unsigned index = 0; index < count; index++) {
    unsigned long one = seen[block + index], other = answered[block + index];
    least[index] = one > other ? one : other;
  }
  int err = 0;
  if (filter_pread (&plugin, NULL, buffer, count * BLOCK, (uint64_t) block * BLOCK, 0, &err) != 0)
    broken ("a read failed", block);
  for (unsigned index = 0; index < count; index++) {
    unsigned long first, last;
    memcpy (&first, buffer + index * BLOCK, sizeof first);
    memcpy (&last, buffer + (index + 1) * BLOCK - sizeof last, sizeof last);
    if (shared (block + index) || torn (first) || torn (last))
      continue;
    first >>= 24, last >>= 24;
    unsigned long value = first > last ? first : last;
    if (first < least[index] || last < least[index])
      broken ("a stale read", block + index);
    if (value > begun[block + index])
      broken ("a read from the future", block + index);
    raise_to (&seen[block + index], first < last ? first : last);
  }
}

static void *
client (void *argument)
{
  unsigned self = (uintptr_t) argument & 0xff;
  disturb_chance = (uintptr_t) argument;
  while (!over) {
    if (below (2))
      client_write (self);
    else
      client_read ();
    operations++;
  }
  return NULL;
}

/* ---- the run ---- */

int
main (int argc, char **argv)
{
  if (argc < 4)
    return 2;
  uint64_t seed = strtoull (argv[2], NULL, 10), flips = strtoull (argv[3], NULL, 10);
  omit_take = argc > 4 && strcmp (argv[4], "take") == 0;
  omit_notes = argc > 4 && strcmp (argv[4], "notes") == 0;
  omit_drain = argc > 4 && strcmp (argv[4], "drain") == 0;
  disturb_chance = seed;
  filter_load ();
  shadowvol_start (SIZE, REGION, ZONE);
  shadowvol_align (512);
  for (int leg = 0; leg < 2; leg++) {
    char path[4096];
    snprintf (path, sizeof path, "%s/leg%d", argv[1], leg);
    leg_fds[leg] = open (path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    if (leg_fds[leg] < 0 || ftruncate (leg_fds[leg], SIZE) != 0)
      return 2;
    shadowvol_open_leg (leg, leg_fds[leg], -1, 1, SIZE, 0);
  }
  pthread_mutex_lock (&author);
  for (unsigned region = 0; region < REGIONS; region++) {
    state[region] = below (2) ? 2 : 2 | 4;
    publish (region);
  }
  pthread_mutex_unlock (&author);
  pthread_t threads[CLIENTS];
  for (uintptr_t self = 0; self < CLIENTS; self++)
    pthread_create (&threads[self], NULL, client, (void *) (seed << 16 | self << 8 << 8 | self));
  for (uint64_t turn = 0; turn < flips || (taken_count < TAKEN_MIN && !omit_take); turn++) {
    flip (below (REGIONS));
    if (below (4) == 0)
      clean (below (ZONES));
  }
  over = true;
  for (unsigned self = 0; self < CLIENTS; self++)
    pthread_join (threads[self], NULL);
  for (unsigned region = 0; region < REGIONS; region++)
    if ((state[region] & (2 | 4)) == (2 | 4))
      compare (region);
  struct counters counted;
  shadowvol_counters (&counted, 1);
  if (counted.in_flight || in_flight (0, SIZE, true, true))
    broken ("something is still in flight", counted.in_flight);
  if (!shadowvol_close_leg (0) || !shadowvol_close_leg (1))
    broken ("a leg cannot be let go", 0);
  if (counted.ended[0] == 0 || counted.ended[1] == 0 || counted.handed_over[0] == 0 || counted.handed_over[1] == 0)
    broken ("nothing was done by the filter, or nothing handed over", 0);
  printf ("{\"operations\": %lu, \"fast\": %lu, \"handed_over\": %lu, \"let_through\": %lu, \"taken\": %lu}\n",
          operations, counted.ended[0] + counted.ended[1], counted.handed_over[0] + counted.handed_over[1],
          counted.let_through[0] + counted.let_through[1], taken_count);
  return 0;
}
