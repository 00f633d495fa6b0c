"""The other end of `server.py`: starts it, asks for runs, waits for them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.tree import aside, put_back, stand_in

REPOSITORY = Path(__file__).resolve().parents[2]
KILLED = -signal.SIGKILL


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Args:
        status: its exit status; negative: a signal.
        printed: what it printed.
        folder: `tree.digest` of the root when it was about to load the model.
        known: it stopped there, since this was asked for.
    """

    status: int
    printed: str
    folder: str = ""
    known: bool = False


class Server:
    """A running `server.py` with a workplace of its own.

    Args:
        place: an empty folder, absolute and without symbolic links. Runs are watched in
            `place/root`; their output is `place/root/run`.
    """

    def __init__(self, place: Path):
        self.place, self.root, self.output = place, place / "root", place / "root" / "run"
        self.config = place / "data" / "config.json"
        self._address = str(place / "socket")
        words = [sys.executable, "-m", "tests.faults.server", self._address, str(self.config)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (place / "server.log").open("wb") as log:
            pipes = {"stdout": subprocess.PIPE, "stderr": log}
            self._process = subprocess.Popen(words, cwd=REPOSITORY, env=environment, **pipes)
        while (line := self._process.stdout.readline()) != b"ready\n":
            if not line:
                reason = (place / "server.log").read_text(errors="replace")
                raise RuntimeError(f"no fault server:\n{reason}")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        self._process.stdout.close()

    def run(self, words: list[str], *, known: Container[str] = (), **options: Any) -> Ended:
        """A run without faults.

        Args:
            words: settings added to those of the config.
            known: digests of folders with which a run need not go on: how is known.
            options: `stop_at`, `other_from`, `sabotage`; `log` with `mode="log"`.
        """
        printed, folder, stopped = self.place / "printed", "", False
        with self._ask(words, errors=str(printed), **{"mode": "plain", **options}) as asked:
            message = asked.receive()
            if message is not None and "folder" in message:
                folder = message["folder"]
                stopped = folder in known
                asked.send(known=stopped)
                message = asked.receive()
        status = KILLED if message is None else message["status"]
        return Ended(status, printed.read_text(errors="replace"), folder, stopped)

    def walk(self, words: list[str], **options: Any) -> Iterator[Point]:
        """The calls of a run, each before it is made; it is made when the next one is asked for.

        Args:
            words: settings added to those of the config.
            options: `stop_at`, `other_from`, `sabotage`.

        Raises:
            RuntimeError: another thread of the run wrote into the folder, unseen.
        """
        with self._ask(
            words,
            errors=str(self.place / "walked"),
            child_errors=str(self.place / "printed"),
            mode="walk",
            **options,
        ) as asked:
            while (message := asked.receive()) is not None and "status" not in message:
                yield Point(self, asked, message)
                asked.send(go=True)
        if message is None or message["elsewhere"]:
            raise RuntimeError(f"the run that is walked ended early or wrote unseen: {message}")

    def _ask(self, words: list[str], **request: Any) -> Channel:
        command = ["train", "--config", str(self.config), "--training.output", str(self.output)]
        connected = socket.socket(socket.AF_UNIX)
        connected.connect(self._address)
        channel = Channel(connected)
        channel.send(words=[*command, *words], root=str(self.root), **request)
        return channel


class Channel:
    """JSON lines over a socket."""

    def __init__(self, connected: socket.socket):
        self._socket, self._lines = connected, connected.makefile("r")

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._socket.close()

    def send(self, **message: Any) -> None:
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any] | None:
        """The next message; None if the other end is gone."""
        try:
            line = self._lines.readline()
        except ConnectionError:
            return None
        return json.loads(line) if line else None


class Point:
    """A call that a walked run is about to make.

    Attributes:
        number: counted from 1.
        op, path, other, size: as in `shim.Call`; paths relative to the root.
        kinds: the faults it can meet.
        saved: the steps of the checkpoints completed by this run.
    """

    def __init__(self, server: Server, asked: Channel, message: dict[str, Any]):
        self._server, self._asked = server, asked
        self.number, self.op, self.size = message["number"], message["op"], message["size"]
        self.path, self.other = message["path"], message["other"]
        self.kinds, self.saved = message["kinds"], message["saved"]

    def meet(self, kind: str) -> Iterator[Ended]:
        """Let a fork of the run meet a fault here and go on alone, in a copy of the folder.

        Yields:
            How it ended, once, while its folder is in place.
        """
        root = self._server.root
        aside(root)
        stand_in(root)
        self._asked.send(fork=kind)
        status = self._asked.receive()["status"]
        printed = (self._server.place / "printed").read_text(errors="replace")
        yield Ended(status, printed)
        put_back(root)
