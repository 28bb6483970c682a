/* The C filter as nbdkit loads it, with disturbed I/O: what it cannot do must come to the plugin and end well there. */

#define _GNU_SOURCE
#include "filter_disturbed.h"
#include "filter.c"
