"""Decides, purely: events in, effects out. No clock, no I/O, no threads; time and randomness are arguments."""
