"""Framed messages between a member and its agent: both ends."""
