/* I/O of the filter that is delayed, cut short, interrupted and failed at random: included before filter.c. */

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>
#include <unistd.h>

static __thread uint64_t disturb_chance;

static unsigned
below (unsigned limit)
{
  disturb_chance = disturb_chance * UINT64_C (6364136223846793005) + UINT64_C (1442695040888963407);
  return (disturb_chance >> 33) % limit;
}

/* True: fail with errno. */
static bool
disturb (size_t *count)
{
  switch (below (100)) {
  case 0: errno = EINTR; return true;
  case 1: errno = EIO; return true;
  case 2: *count = *count / 2 + 1; return false;
  case 3: case 4: case 5: usleep (below (400)); return false;
  default: return false;
  }
}

static ssize_t
disturbed_pread (int fd, void *buffer, size_t count, off_t offset)
{
  return disturb (&count) ? -1 : pread (fd, buffer, count, offset);
}

static ssize_t
disturbed_pwrite (int fd, const void *buffer, size_t count, off_t offset)
{
  return disturb (&count) ? -1 : pwrite (fd, buffer, count, offset);
}

#define SHADOWVOL_PREAD disturbed_pread
#define SHADOWVOL_PWRITE disturbed_pwrite
