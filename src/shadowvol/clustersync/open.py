"""Choose the coordinator by its state URL (--state, SHADOWVOL_STATE)."""

from shadowvol.clustersync.coordinator import Coordinator
from shadowvol.clustersync.sqlite import SqliteCoordinator

FORMS = "sqlite:PATH"


def open_coordinator(url: str) -> Coordinator:
    """Open the record of truth named by `url`; blocks for some milliseconds.

    Raises ValueError (one line, for the user) for a URL that names none, CoordinatorUnreachable or RecordDamaged where
    what it names cannot be used.
    """
    scheme, colon, place = url.partition(":")
    if not colon:
        raise ValueError(f"{url!r} is not a state URL; it has the form {FORMS}")
    if scheme == "etcd":
        raise ValueError(f"etcd is not in this version of shadowvol; the state URL has the form {FORMS}")
    if scheme != "sqlite":
        raise ValueError(f"the state URL {url!r} begins with an unknown scheme; it has the form {FORMS}")
    if not place or place.endswith("/") or "\0" in place:
        raise ValueError(f"the state URL {url!r} names no file; it has the form {FORMS}")
    return SqliteCoordinator(place)
