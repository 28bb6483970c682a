"""What a process uses, from /proc."""

import os
from pathlib import Path


def memory_mib(pid: int) -> tuple[float, float]:
    """(resident, its own): pages that it shares with n others count there as 1/(n + 1)."""
    fields = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        fields[name] = int(rest.split()[0]) / 1024
    return fields["Rss"], fields["Pss"]


def cpu_s(pid: int) -> float:
    """Processor time that it has used since its start, in user and kernel."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
