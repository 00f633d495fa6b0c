"""What the body of every op runs under, whatever its caller has set."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps

import torch


def op_body(body: Callable) -> Callable:
    """An op's body under its tensors' device and without autocast.

    Triton launches on the current device, and a custom op sets none: with a model spread over GPUs
    (`device_map="auto"`) the current one is often another than the tensors'. And the operands come
    in the dtypes that the call is to be computed in.
    """

    @wraps(body)
    def run(*arguments):
        device = arguments[0].device  # the first argument of every op is a tensor
        here = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        casts = torch.amp.is_autocast_available(device.type)  # not on meta
        with here, torch.autocast(device.type, enabled=False) if casts else nullcontext():
            return body(*arguments)

    return run
