"""shadowvol: transparent live storage migration. The version is defined here and nowhere else."""

__version__ = "0.1.0"
