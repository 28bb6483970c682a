"""The block data plane: nbdkit's Python plugin, the member around it, starting and attaching it."""
