"""A process that has imported everything and forks a run of the trainer for each request.

`python -m tests.faults.server SOCKET CONFIG`; `client.py` is the other end. A run that is walked
stops before each of its calls on the watched folder and asks. On "fork" a child of it meets a fault
there and goes on alone, in a copy of the folder that the client has put in the folder's place.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any, BinaryIO

import torch

from tests.faults import shim, tree
from tests.faults.materials import make
from tests.faults.plan import Fault, kinds

LIMIT = 120  # seconds that a run may take
ASIDE = ".aside"  # what the folder is called while a copy stands in its place


class Channel:
    """JSON lines over a socket."""

    def __init__(self, connected: socket.socket):
        self._socket = connected
        self._lines = connected.makefile("r")

    def send(self, **message: Any) -> None:
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any] | None:
        """The next message; None if the other end is gone."""
        line = self._lines.readline()
        return json.loads(line) if line else None

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


class Walked:
    """Hooks of a run that asks before each call."""

    def __init__(self, channel: Channel, root: Path, errors: str):
        self.channel, self.root, self.errors = channel, root, errors
        self.number, self.saved = 0, []
        self.fault: Fault | None = None

    def before(self, call: shim.Call) -> int:
        if self.fault is not None:
            return self.fault.answer(call)
        self.number += 1
        names = [
            os.path.relpath(name, self.root) if name else "" for name in (call.path, call.other)
        ]
        self.channel.send(
            number=self.number, op=call.op, path=names[0], other=names[1], size=call.size,
            kinds=kinds(call), saved=self.saved,
        )  # fmt: skip
        while (asked := self.channel.receive()) is not None and "fork" in asked:
            sys.stdout.flush()
            sys.stderr.flush()
            child = os.fork()
            if child == 0:
                return self._go_wrong(Fault(asked["fork"]), call)
            self.channel.send(status=os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        if asked is None:
            os._exit(98)
        return shim.GO

    def after(self, call: shim.Call, result: int) -> None:
        pass

    def _go_wrong(self, fault: Fault, call: shim.Call) -> int:
        shim.forked()
        signal.alarm(LIMIT)
        self.channel.close()
        redirect(self.errors)
        reopen(self.root)
        self.fault = fault
        return fault.answer(call)


class Logged:
    """Hooks of a run whose calls are written down with their data."""

    def __init__(self, file: BinaryIO):
        self.file = file

    def before(self, call: shim.Call) -> int:
        return shim.GO

    def after(self, call: shim.Call, result: int) -> None:
        content = Path(call.path).read_bytes() if call.op == "copy" else None
        pickle.dump(("call", call, result, content), self.file)


def reopen(root: Path) -> None:
    """Point the open files of a folder that was put aside to their copies in its place."""
    aside = str(root) + ASIDE
    for entry in os.listdir("/proc/self/fd"):
        try:
            path = os.readlink(f"/proc/self/fd/{entry}")
        except OSError:  # that of the listing itself
            continue
        copy = str(root) + path.removeprefix(aside)
        if not path.startswith(aside + "/") or not os.path.exists(copy):
            continue
        fd, info = int(entry), Path(f"/proc/self/fdinfo/{entry}").read_text().split()
        flags = int(info[info.index("flags:") + 1], 8)
        new = os.open(copy, flags & ~(os.O_CREAT | os.O_EXCL | os.O_TRUNC))
        os.lseek(new, int(info[info.index("pos:") + 1]), os.SEEK_SET)
        os.dup2(new, fd)
        os.close(new)


def redirect(path: str) -> None:
    """Send what this process prints to a file."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)


def on_saved(told: Any) -> None:
    """Call `told(step)` when a checkpoint is complete, as the Trainer sees it."""
    from transformers.trainer_callback import CallbackHandler

    plain = CallbackHandler.on_save

    def on_save(self, args, state, control):
        control = plain(self, args, state, control)
        told(state.global_step)
        return control

    CallbackHandler.on_save = on_save


def before_step(step: int, act: Any) -> None:
    """Call `act(model)` before a step begins."""
    from transformers.trainer_callback import CallbackHandler

    plain = CallbackHandler.on_step_begin

    def on_step_begin(self, args, state, control):
        if state.global_step == step - 1:
            act(self.model)
        return plain(self, args, state, control)

    CallbackHandler.on_step_begin = on_step_begin


def before_loading(act: Any) -> None:
    """Call `act()` when the folder has been read and tidied, before the model is loaded."""
    from groundkern.trainer import train

    plain = train.load_model

    def load_model(config):
        act()
        return plain(config)

    train.load_model = load_model


def _stop_if_known(channel: Channel, root: Path) -> None:
    """What a run does from here on follows from the folder: once is enough for each."""
    sys.stdout.flush()
    sys.stderr.flush()
    channel.send(folder=tree.digest(root))
    answer = channel.receive()
    if answer is None or answer["known"]:
        channel.send(status=0)
        os._exit(0)


def another_machine(model: torch.nn.Module) -> None:
    """Stands for whatever makes the same command give other bits: what follows can be told apart
    from what a checkpoint before it leads to."""
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).add_(1e-2)


def sabotage(what: str) -> None:
    """Make a run careless, to see that the walk finds it.

    Args:
        what: "no flushes": nothing is ever synced. "in place": files are written under their own
            names. "no hashes": checkpoints are taken as they are.
    """
    from groundkern.trainer import checkpoints, durable

    def write_in_place(path: Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    match what:
        case "no flushes":
            os.fsync = lambda fd: None
        case "in place":
            durable.write_bytes = write_in_place
        case "no hashes":
            checkpoints.fault = lambda checkpoint: None


def run(request: dict[str, Any], channel: Channel) -> None:
    """Be one run, and end this process with its status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.alarm(LIMIT * (1 if request["mode"] == "plain" else 1000))
    redirect(request["errors"])
    process = os.getpid()
    os.getpid = lambda: process  # a fork that goes on as the run passes for it
    if request.get("stop_at"):
        before_step(request["stop_at"], lambda _: signal.raise_signal(signal.SIGTERM))
    if request.get("other_from"):
        before_step(request["other_from"], another_machine)
    if request.get("sabotage"):
        sabotage(request["sabotage"])
    hooks = None
    if request["mode"] == "plain":
        before_loading(lambda: _stop_if_known(channel, Path(request["root"])))
    if request["mode"] == "walk":
        hooks = Walked(channel, Path(request["root"]), request["child_errors"])
        on_saved(hooks.saved.append)
    if request["mode"] == "log":
        log = open(request["log"], "wb")  # noqa: SIM115
        hooks = Logged(log)
        on_saved(lambda step: pickle.dump(("saved", step), log))
    if hooks is not None:
        shim.watch(Path(request["root"]), hooks.before, hooks.after)
    status = _status(request["words"])
    if request["mode"] == "log":
        log.close()
    if not isinstance(hooks, Walked) or hooks.fault is None:
        channel.send(status=status, elsewhere=shim.calls_of_other_threads() if hooks else 0)
    os._exit(status)


def _status(words: list[str]) -> int:
    """The status with which `groundkern` would end."""
    from groundkern.trainer.program import main

    try:
        status = main(words)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # as the interpreter does
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def warm(config: Path, scratch: Path) -> None:
    """Run once, so that what is imported, compiled and cached on the way is there for every fork.

    The curves of the report are replaced: drawing them takes longer than all the rest of a run.
    """
    import gc

    from groundkern.trainer import report
    from groundkern.trainer.program import main

    curve = "<img>"
    if hasattr(report, "loss_curves"):
        report.loss_curves = lambda *args, **options: curve
    words = ["train", "--config", str(config), "--training.output", str(scratch)]
    if main(words):
        raise SystemExit("the tiny run fails without any fault")
    shutil.rmtree(scratch)
    gc.collect()
    gc.freeze()


def main() -> None:
    """Serve until the client is gone."""
    address, config = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    make(config.parent)
    warm(config, Path(address).with_name("warm"))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener.settimeout(2)
    client = os.getppid()
    print("ready", flush=True)
    while os.getppid() == client:
        try:
            connected, _ = listener.accept()
        except TimeoutError:
            continue
        connected.settimeout(None)
        channel = Channel(connected)
        request = channel.receive()
        if os.fork() == 0:
            listener.close()
            run(request, channel)
        channel.close()


if __name__ == "__main__":
    main()
