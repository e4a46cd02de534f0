"""A command that is killed in its middle: SIGKILL, which nothing can catch, right behind a part that reached the disk."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence

PROGRAM = """
import os, signal, sys
from prefopt import cli

fsync, left = os.fsync, int(sys.argv.pop(1))

def last(file):
    global left
    fsync(file)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

os.fsync = last
sys.exit(cli.main(sys.argv[1:]))
"""


def killed_behind(parts: int, argv: Sequence[object]) -> str:
    """Run `prefopt *argv` in a process of its own until so many parts of its journal are written; returns what it said."""
    command = [sys.executable, "-c", PROGRAM, str(parts), *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), timeout=200)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    return done.stdout + done.stderr
