"""Another process that claims a file."""

from __future__ import annotations

import os

from groundkern.trainer import run_folder


def claims(path, *, wait=False):
    """A child that claims a file: (its id, a pipe that says "1 1" if the file is the child's to
    make and is there, and a pipe that lets it end)."""
    told, tell = os.pipe()
    until, end = os.pipe()
    child = os.fork()
    if not child:
        os.close(end)
        with run_folder.claimed(path, wait=wait) as own:
            os.write(tell, f"{own:d} {path.exists():d}".encode())
            os.read(until, 1)
        os._exit(0)
    os.close(tell)
    os.close(until)
    return child, told, end


def over(child, end):
    """Lets a child end."""
    os.close(end)
    os.waitpid(child, 0)
