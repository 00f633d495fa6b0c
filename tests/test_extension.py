"""groundkern._C as an extension of Python: its references, errors, threads, and how it ends.

tests/test_bindings.py is about the arguments of its functions.
"""

from __future__ import annotations

import contextlib
import gc
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from tests.test_bindings import arguments, tensors, view

_C = pytest.importorskip("groundkern._C", reason="groundkern._C is not built: no C++ compiler")

# In a fresh process without torch: the extension that is tested here, and arguments of a call that
# takes a good part of a second.
LONG_CALL = f"""
import ctypes, importlib.util, math, signal, sys, threading, time
spec = importlib.util.spec_from_file_location("groundkern._C", {_C.__file__!r})
_C = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_C)
kept = []
def tensor(code, *sizes, fill=0):
    kind = ctypes.c_float if code == _C.float32 else ctypes.c_int32
    kept.append((kind * math.prod(sizes))(*[fill] * (math.prod(sizes) if fill else 0)))
    strides = tuple(math.prod(sizes[i + 1 :]) for i in range(len(sizes)))
    return ctypes.addressof(kept[-1]), code, sizes, strides
n, keys, width = {64 if _C.sanitized else 1024}, 2048, 64
given = {{"q": tensor(0, n, 8, width), "k": tensor(0, 1, 8, keys, width)}}
given |= {{"v": given["k"], "out": tensor(0, n, 8, width), "lse": tensor(0, n, 8)}}
given |= {{name: tensor(_C.int32, n) for name in ("sequence", "start")}}
given |= {{"stop": tensor(_C.int32, n, fill=keys), "bits": None, "set_index": None}}
given |= {{"scale": 0.1, "softcap": 0.0, "threads": 1}}
"""


def without_rows() -> dict[str, object]:
    """A call that costs microseconds: it has no rows."""
    x = tensors()
    empty = {
        name: torch.empty(0, *x[name].shape[1:], dtype=x[name].dtype)
        for name in ("q", "out", "lse", "sequence", "start", "stop")
    }
    (b, heads, _, width), v_width = x["k"].shape, x["v"].shape[3]
    empty |= {"k": torch.empty(b, heads, 0, width), "v": torch.empty(b, heads, 0, v_width)}
    return {**arguments(empty), "bits": None, "set_index": None}


def test_calls_keep_no_references() -> None:
    """Neither those that run nor those that are refused: bindings by hand could."""
    x = tensors()  # kept: an argument is an address
    given = arguments(x)
    address = 2**62 + 1  # a number of its own, which nothing else refers to
    wrongs = [{**given, "scale": "half"}, {**given, "q": (address, 0, (1, address), 7)}]
    wrongs += [{**given, "q": (address, *given["q"][1:])}, {**given, "threads": 0}]
    wrongs += [{**given, "left": address}, dict(list(given.items())[:-1])]
    kept = [*given.values(), *given["q"], "half", address, None, True, TypeError, ValueError]
    gc.collect()
    before = [sys.getrefcount(value) for value in kept]
    for _ in range(2000):
        _C.side_attention_forward(**given)
        _C.cpu_isas()
        _C.has_matrix_product(_C.float32)
        for wrong in wrongs:
            with contextlib.suppress(TypeError, ValueError):
                _C.side_attention_forward(**wrong)
    grown = [sys.getrefcount(value) - count for value, count in zip(kept, before)]
    assert max(map(abs, grown)) < 1000


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.skipif(_C.sanitized, reason="the sanitizer keeps freed memory for a while")
def test_calls_keep_no_memory() -> None:
    given = without_rows()
    wrong = {**given, "scale": "half"}

    def call(times: int) -> None:
        for _ in range(times):
            _C.side_attention_forward(**given)
            with contextlib.suppress(TypeError):
                _C.side_attention_forward(**wrong)

    call(5_000)
    before = resident()
    call(100_000)
    assert resident() - before < 1_000_000, "five bytes a call"


class Raises:
    """Stands for a number, until it is asked for one."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __index__(self) -> int:
        raise self.error

    __float__ = __index__


@pytest.mark.parametrize("name", ["threads", "scale", "address", "size"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), MemoryError()])
def test_what_no_refusal_may_hide_goes_through(name: str, error: BaseException) -> None:
    x = tensors()
    raises = Raises(error)
    address, code, sizes, strides = view(x["q"])
    views = {"address": (raises, code, sizes, strides)}
    views["size"] = (address, code, (*sizes[:2], raises), strides)
    replaced = {"q": views[name]} if name in views else {name: raises}
    with pytest.raises(type(error)) as found:
        _C.side_attention_forward(**arguments(x, **replaced))
    assert found.value is error
    assert x["out"].isnan().all()


def test_another_error_of_a_number_is_a_refusal() -> None:
    x = tensors()
    with pytest.raises(TypeError, match=r"^`threads`: not convertible from Raises$"):
        _C.side_attention_forward(**arguments(x, threads=Raises(KeyError("no"))))


class Number(int):
    pass


class Index:
    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


@pytest.mark.parametrize("kind", [Number, Index])
def test_an_integer_may_be_of_any_type(kind: type) -> None:
    """As numpy's are: in an address, a dtype code, a size and a stride."""
    x = tensors()
    _C.side_attention_forward(**arguments(x))
    wanted = x["out"].clone()
    x["out"].zero_()
    address, code, sizes, strides = view(x["q"])
    q = (kind(address), kind(code), tuple(map(kind, sizes)), tuple(map(kind, strides)))
    _C.side_attention_forward(**arguments(x, q=q, threads=kind(1), scale=Index(1)))
    _C.side_attention_forward(**arguments(x, q=q, threads=kind(1)))
    assert torch.equal(x["out"], wanted)


class Pair(tuple):
    pass


def test_a_view_is_a_tuple() -> None:
    """Of a subclass too; a list could change while its items are converted."""
    x = tensors()
    q = view(x["q"])
    _C.side_attention_forward(**arguments(x, q=Pair((*q[:2], torch.Size(q[2]), Pair(q[3])))))
    for wrong in (list(q), (*q[:2], list(q[2]), q[3]), (*q, 1), q[:3], ()):
        with pytest.raises(TypeError, match=r"^`q`: not convertible from (list|tuple)$"):
            _C.side_attention_forward(**arguments(x, q=wrong))


def test_names_that_are_no_utf8_are_told() -> None:
    x = tensors()
    with pytest.raises(TypeError, match=r"^`\?`: not an argument of this function$"):
        _C.side_attention_forward(**arguments(x), **{"\udc80": 1})


def test_threads_call_side_by_side() -> None:
    """Each has results of its own; those that are refused do not disturb the others."""
    given = [tensors() for _ in range(4)]
    for x in given:
        _C.side_attention_forward(**arguments(x))
    wanted = [(x["out"].clone(), x["lse"].clone()) for x in given]
    wrong: list[int] = []

    def work(index: int) -> None:
        x = given[index]
        for turn in range(300):
            x["out"].zero_()
            if turn % 3 == 0:
                with contextlib.suppress(ValueError):
                    _C.side_attention_forward(**arguments(x, threads=0))
            _C.side_attention_forward(**arguments(x))
            if not (
                torch.equal(x["out"], wanted[index][0]) and torch.equal(x["lse"], wanted[index][1])
            ):
                wrong.append(index)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(given))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def fresh(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LONG_CALL + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_kernel_leaves_python_its_lock_its_signals_and_its_end() -> None:
    """A daemon thread may be in a kernel when the program ends. Before 3.14 Python unwinds it when
    it asks for the lock again, through our C++: that must not abort."""
    done = fresh("""
ticks, going = [], True
def tick():
    while going:
        ticks.append(time.monotonic())
        time.sleep(0.002)
other = threading.Thread(target=tick)
other.start()
begun = time.monotonic()
_C.side_attention_forward(**given)
ended = time.monotonic()
going = False
other.join()
print(sum(begun < x < ended for x in ticks) > 3)

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
threading.Timer(0.03, signal.raise_signal, [signal.SIGINT]).start()
try:
    while True: _C.side_attention_forward(**given)
except KeyboardInterrupt:
    print("interrupted")

def work():
    while True: _C.side_attention_forward(**given)
class Late:
    def __del__(self): time.sleep(1)  # the thread comes back before the process is gone
threading.Thread(target=work, daemon=True).start()
time.sleep(0.05)
sys.modules["late"] = Late()
print("ends", flush=True)
""")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["True", "interrupted", "ends"]


@pytest.mark.skipif(_C.sanitized, reason="the sanitizer needs more addresses than the limit")
def test_a_kernel_without_memory_is_a_memory_error() -> None:
    """16 GiB for the ranges of 2^31 - 1 sequences, which have no key, under a limit of 4 more."""
    done = fresh("""
import resource
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**32, -1))
many = (0, _C.float32, (2**31 - 1, 8, 0, width), (0, 0, 0, 1))
try:
    _C.side_attention_forward(**{**given, "k": many, "v": many, "stop": given["start"]})
except MemoryError:
    print("MemoryError")
given["scale"] = 0.5; _C.side_attention_forward(**given)  # and the lock is back
print("goes on")
""")
    assert done.stdout.split("\n")[:2] == ["MemoryError", "goes on"], done.stderr


@pytest.mark.skipif(_C.sanitized, reason="a sub-interpreter's own memory is not what it looks at")
def test_a_sub_interpreter_has_the_module_too() -> None:
    """It keeps no state. (With a lock of its own an interpreter refuses it, from 3.12 on.)"""
    name = "_xxsubinterpreters" if sys.version_info < (3, 13) else "_interpreters"
    pytest.importorskip(name, reason="this Python has no sub-interpreters")
    code = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("groundkern._C", {_C.__file__!r})
again = importlib.util.module_from_spec(spec)
spec.loader.exec_module(again)
assert again.cpu_isas() == {_C.cpu_isas()!r}
try:
    again.side_attention_forward()
except TypeError as error:
    assert "missing" in str(error)
else:
    raise AssertionError
"""
    # In a process of its own: once there was a second interpreter, Python says of every thread that
    # it holds the lock, and torch's autograd refuses to run.
    how = "isolated=False" if sys.version_info < (3, 13) else "'legacy'"
    done = fresh(f"""
import {name} as interpreters
new = interpreters.create({how})
failure = interpreters.run_string(new, {code!r})  # before 3.13 it raises
interpreters.destroy(new)
assert failure is None, failure
print(len(_C.cpu_isas()), "isas")
""")
    assert done.stdout == f"{len(_C.cpu_isas())} isas\n", done.stderr


@pytest.mark.skipif(_C.sanitized, reason="the sanitizer adds names of its own")
@pytest.mark.skipif(shutil.which("nm") is None, reason="reads symbols with nm, which is not here")
def test_the_extension_shows_one_symbol() -> None:
    """Else its copies of libstdc++'s templates could stand in for another library's, and theirs for
    these."""
    command = ["nm", "-D", "--defined-only", _C.__file__]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split()[-1] for line in lines] == ["PyInit__C"]
