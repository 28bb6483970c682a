"""The transfer utility: a process of its own that performs the leader's copy effects."""
