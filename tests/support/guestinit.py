"""In the guest: connect to the test, and run what it says. Standard library only; see tests/support/guest.py."""

import json
import os
import socket
import subprocess
import sys
from typing import Any

_children: dict[int, "subprocess.Popen[bytes]"] = {}


def _do(order: dict[str, Any]) -> dict[str, Any]:
    if "run" in order:
        done = subprocess.run(order["run"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        return {"code": done.returncode, "out": done.stdout.decode(errors="replace")}
    if "start" in order:
        with open(order["out"], "wb") as out:
            child = subprocess.Popen(order["start"], stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        _children[child.pid] = child
        return {"pid": child.pid}
    child = _children.pop(order["end"])
    if child.poll() is None:
        os.kill(child.pid, order["signal"])
    return {"code": child.wait()}


def main() -> None:
    with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as connection:
        for line in connection.makefile("r"):
            try:
                answer = _do(json.loads(line))
            except Exception as error:
                answer = {"error": repr(error)}
            connection.sendall(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main()
