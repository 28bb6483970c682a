"""The C fast path: filter.c (its header is its documentation), found and tried by usable.py, spoken to by cgate.py."""
