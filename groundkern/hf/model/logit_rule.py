"""What a model's own forward does with its logits, measured: a scale, a softcap, ids left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from groundkern.checks import fail, require
from groundkern.hf.model.own_forward import ATTACHMENT, run_own

# Logits that the forward is given, one value in each row. The smallest tells the slope at 0, the
# largest whether there is a softcap, the others that there is nothing else.
PROBES = (0.0, 2.0**-10, 1.0, -1.0, 7.0, -30.0, 200.0, 1e8)
BLOCKED = -1e30  # added to the logit of an id that is left out; its exponential is 0 in any dtype
SAME = 1e-5  # relative: rounding of fp32


class LogitRule(NamedTuple):
    """What a forward does around its head: `softcap(head(hidden * scale)) + offset`."""

    scale: float
    softcap: float | None
    offset: Tensor | None = None  # fp32 [V]: BLOCKED for ids that can never be predicted, else 0

    def of(self, logits: Tensor) -> Tensor:
        """The logits after softcap and offset.

        Args:
            logits: [..., V] what the head returned.

        Returns:
            [..., V].
        """
        logits = soft_capped(logits, self.softcap)
        return logits if self.offset is None else logits + self.offset.to(logits.device)


def soft_capped(logits: Tensor, softcap: float | None) -> Tensor:
    """`softcap * tanh(logits / softcap)`; None: the logits as they are."""
    return logits if softcap is None else softcap * (logits / softcap).tanh()


def logit_rule(model: nn.Module) -> LogitRule:
    """The logit rule of a model: what `attach` measured, or a new measurement.

    Neither the config nor the source tells. Gemma3's vision model has no softcap although its text
    config names one; a forward that somebody patched has other source than it does.

    Args:
        model: a transformers model without wrappers.

    Returns:
        LogitRule.

    Raises:
        ValueError: a forward whose logits are anything else, a scale on a head with a bias.
    """
    attachment = vars(model).get(ATTACHMENT)
    return measured_rule(model) if attachment is None else attachment.rule


class _Output:
    """A body's output that has hidden states and nothing else."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


def measured_rule(model: nn.Module) -> LogitRule:
    """A new measurement, as in `logit_rule`."""
    name, head = type(model).__name__, model.get_output_embeddings()
    size = _head_size(model)
    wanted = "a forward that runs its body, then its head on the last hidden states"
    seen: list[Tensor] = []  # what reached the head
    try:
        output = _run_on_probes(model, seen)
    except Exception as error:  # whatever a class or a patch raises
        fail("model", wanted, f"{name}: {type(error).__name__}: {error}")
    hidden, logits = _probe_hidden(model), getattr(output, "logits", None)
    require(len(seen) == 1 and isinstance(logits, Tensor), "model", wanted, name)
    before, (after, softcap, offset) = _factor(name, hidden, seen[0]), _curve(name, logits, size)
    if after != 1.0 and getattr(head, "bias", None) is not None:
        fail("model", "a head without bias where logits are scaled", name)
    if offset is not None and softcap is not None:
        fail("model", "logits with a softcap or with ids left out, not both", name)
    return LogitRule(before * after, softcap, offset)


def refuse_other_losses(model: nn.Module) -> None:
    """Refuse a forward that makes more of its logits than its text loss, which training with rows
    would leave out: Bamba's z-loss.

    Args:
        model: a transformers model without wrappers, whose logit rule was measured.

    Raises:
        ValueError: a loss that is not 0 where the text loss is.
    """
    device = torch.device("cpu") if _device(model).type == "meta" else _device(model)
    calls: list[Tensor] = []

    def nothing(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(torch.zeros((), device=device))
        return calls[0]

    try:
        loss = _run_on_probes(model, [], nothing).loss
    except Exception:  # losses that cannot be run so are refused where they are on (router.py)
        return
    if calls and isinstance(loss, Tensor) and bool(loss != 0):
        wanted = "a loss of next tokens, and of routers, alone (set others to 0 in its config)"
        fail("model", wanted, f"{type(model).__name__}, which adds another")


def _run_on_probes(
    model: nn.Module, seen: list[Tensor], loss: Callable[..., Tensor] | None = None
) -> Any:
    """A forward's output where its head returns PROBES; `seen` receives what reached the head.
    With labels if there is a loss to be called."""
    probes = torch.tensor(PROBES, dtype=torch.float64)[None, :, None]
    probes = probes.expand(1, -1, _head_size(model))

    def stand_in(x: Tensor) -> Tensor:
        seen.append(x)
        return probes.clone()

    hidden, device = _probe_hidden(model), _device(model)
    ids = torch.zeros(1, len(PROBES), dtype=torch.int64)
    ids = ids if device.type == "meta" else ids.to(device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    if loss is not None:
        inputs["labels"] = ids
    with torch.no_grad():
        return run_own(
            model, inputs, body=lambda *_, **__: _Output(hidden), head=stand_in, loss=loss
        )


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _head_size(model: nn.Module) -> int:
    """V, the logits of a token."""
    head = model.get_output_embeddings()
    return getattr(head, "out_features", None) or model.config.get_text_config().vocab_size


def _probe_hidden(model: nn.Module) -> Tensor:
    """[1, rows, D] of powers of two, exact in any dtype; a norm would change rows unevenly."""
    rows, width = len(PROBES), model.config.get_text_config().hidden_size
    generator = torch.Generator().manual_seed(0)
    power = torch.randint(0, 3, (1, rows, width), generator=generator)
    sign = torch.randint(0, 2, (1, rows, width), generator=generator) * 2 - 1
    size = torch.arange(rows)[None, :, None] % 4
    return (sign * 2.0 ** (power + size)).float()


def _factor(name: str, given: Tensor, found: Tensor) -> float:
    """By how much hidden states are multiplied before the head."""
    same = found.shape == given.shape
    ratio = found.detach().to("cpu", torch.float64) / given if same else torch.zeros(1)
    factor = float(ratio.mean())
    even = bool(((ratio - factor).abs() <= 2**-8 * abs(factor)).all())
    if not even or not factor:
        fail("model", "a head on the last hidden states, times a number", name)
    return 1.0 if abs(factor - 1.0) < SAME else factor


def _curve(name: str, logits: Tensor, size: int) -> tuple[float, float | None, Tensor | None]:
    """The scale, the softcap and the offset that made `logits` of PROBES."""
    found = logits.detach()[0].to("cpu", torch.float64)  # [probes, V]
    blocked = torch.ones(size, dtype=torch.bool)
    blocked[: found.shape[1]] = (found < -1e9).all(0)
    wanted = "logits that are softcap(logits * scale), alike for all ids"
    require(found.shape[0] == len(PROBES) and not bool(blocked.all()), "model", wanted, name)
    rows = found[:, ~blocked[: found.shape[1]]]
    probes, value = torch.tensor(PROBES, dtype=torch.float64), rows[:, 0]
    linear = abs(float(value[-1] / probes[-1] - value[2])) <= SAME * abs(float(value[2]))
    scale = float(value[2]) if linear else float(value[1] / probes[1])
    scale = 1.0 if abs(scale - 1.0) < SAME else scale
    softcap = None if linear else float(value[-1])
    require(softcap is None or softcap > 0, "model", wanted, name)
    known = soft_capped(probes * scale, softcap)[:, None]
    require(bool(((rows - known).abs() <= SAME * known.abs()).all()), "model", wanted, name)
    offset = torch.where(blocked, BLOCKED, 0.0) if bool(blocked.any()) else None
    return scale, softcap, offset
