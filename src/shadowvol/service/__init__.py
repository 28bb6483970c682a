"""shadowvol under systemd: the units, their installation, and what has to happen before a host shuts down."""
