"""Where bytes live: files, devices and NBD exports behind one protocol."""
