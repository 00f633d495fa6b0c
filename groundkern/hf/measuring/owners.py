"""Pixel to token: which visual token each number of the processor's float tensors goes into.

One run of the model up to its decoder, with noise as pixels and without what the vision tower's
attention adds, so that a token depends on its own pixels alone. The gradient of all tokens is taken
again with the signs of some of them turned, one time for each binary digit of a token's number:
where a number goes into one token alone, the signs of its gradient spell that token's number.
Where the sizes differ too, it goes into several.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from groundkern.checks import fail, require
from groundkern.hf.model.modes import modes_kept
from groundkern.hf.model.support import base_model

ALONE = 1e-3  # of a gradient: what it may differ by where a number goes into one token alone
FAINT = 1e-6  # of the largest gradient: rounding, of convolutions by a Fourier transform
MIXERS = ("Attention", "ShortConv")  # in names of classes: what adds other patches to a patch
MOST_SHARED = 64  # tokens that a number goes into, on average; above, tokens have no place


class _Reached(Exception):
    """The decoder was reached, and nothing behind it is needed."""


class Owners(NamedTuple):
    """Which numbers of all float tensors, one after the other, go into which tokens.

    Args:
        token: int64 [N].
        element: int64 [N], the index of the number.
        share: fp32 [N], how much of the number goes into this token: 1 if into no other.
        tokens: how many visual tokens there are.
    """

    token: Tensor
    element: Tensor
    share: Tensor
    tokens: int


def owners_of(
    model: nn.Module, batch: Mapping[str, Any], picture: Mapping[str, Tensor], image_token: int
) -> Owners:
    """Measure which visual tokens each number of a picture goes into.

    Args:
        model: any vision-language model whose decoder is given embeddings; nothing of it changes.
        batch: what its processor returned for one sample.
        picture: bool, the shape of each float tensor of the batch: what is not padding.
        image_token: the id of visual tokens.

    Returns:
        The tokens of each number.

    Raises:
        ValueError: tokens that have no place, with the reason.
    """
    model = base_model(model)
    pixels = _noise(model, batch, picture)
    inputs = {k: x.to(model.device) if isinstance(x, Tensor) else x for k, x in batch.items()}
    inputs |= pixels
    with modes_kept(model), torch.enable_grad():
        model.eval()
        with _without_attention(model):
            tokens = _visual_tokens(model, inputs, image_token)
        gradients = _Gradients(tokens, list(pixels.values()))
        if not gradients.any:
            whole = _Gradients(_visual_tokens(model, inputs, image_token), list(pixels.values()))
            _refuse(whole.any)
        return _owners(gradients, torch.cat([x.flatten() for x in picture.values()]))


def _refuse(attending: bool) -> None:
    wanted = "visual tokens that each show a place of the image"
    if attending:
        fail("model", wanted, "a resampler: its tokens see pixels by attention alone")
    fail(
        "model",
        wanted,
        "none with a gradient of the pixels (discrete codes, or pixels that enter elsewhere)",
    )


def _noise(
    model: nn.Module, batch: Mapping[str, Any], picture: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The float tensors with noise in the place of the picture, as leaves of a graph."""
    decoder = {id(p) for p in model.get_decoder().parameters()}
    tower = (p.dtype for p in model.parameters() if id(p) not in decoder and p.is_floating_point())
    dtype = next(tower, model.dtype)
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, shown in picture.items():
        noise = torch.randn(shown.shape, generator=generator)
        x = torch.where(shown, noise, batch[name].float())
        made[name] = x.to(model.device, dtype).requires_grad_()
    return made


@contextmanager
def _without_attention(model: nn.Module) -> Iterator[None]:
    """Attention outside of the decoder adds nothing within the block."""
    decoder = set(model.get_decoder().modules())
    with ExitStack() as stack:
        for module in model.modules():
            if module not in decoder and _is_attention(module):
                stack.callback(module.register_forward_hook(_nothing).remove)
        yield


def _is_attention(module: nn.Module) -> bool:
    """The innermost of modules that are named so: Pixtral calls its whole blocks that."""
    named = [any(mixer in type(part).__name__ for mixer in MIXERS) for part in module.modules()]
    return named[0] and not any(named[1:])


def _nothing(module: nn.Module, args: tuple, output: Any) -> Any:
    if isinstance(output, Tensor):
        return torch.zeros_like(output)
    return (torch.zeros_like(output[0]), *output[1:])


def _visual_tokens(model: nn.Module, inputs: dict[str, Any], image_token: int) -> Tensor:
    """[n, D]: the embeddings that the decoder is given at the image tokens."""
    seen: list[Tensor] = []

    def stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = kwargs.get("inputs_embeds")
        seen.extend([] if given is None else [given])
        raise _Reached

    hook = model.get_decoder().register_forward_pre_hook(stop, with_kwargs=True)
    body = model.base_model
    try:
        # not the whole model, whose forward may be another's (attach)
        body(**inputs) if body is not model else type(model).forward(model, **inputs)
    except _Reached:
        pass
    finally:
        hook.remove()
    require(seen, "model", "a decoder that is given embeddings", "one that is not")
    return seen[0][inputs["input_ids"] == image_token]


class _Gradients:
    """Gradients of the visual tokens, each with random weights of its own."""

    def __init__(self, tokens: Tensor, pixels: list[Tensor]) -> None:
        generator = torch.Generator().manual_seed(1)
        self._tokens, self._pixels, self.tokens = tokens, pixels, len(tokens)
        self._weights = torch.randn(tokens.shape, generator=generator).to(tokens)
        self._faint = 0.0
        self.whole = self(torch.ones(len(tokens)))
        finite = bool(torch.isfinite(self.whole).all())
        require(finite, "model", "finite gradients of its visual tokens", "others")
        self._faint = FAINT * float(self.whole.abs().amax())
        self.any = bool(self.whole.any())

    def __call__(self, signs: Tensor) -> Tensor:
        """fp32 on the CPU: the gradient by all numbers, one after the other; signs [n]."""
        if not self._tokens.requires_grad:
            return torch.zeros(sum(x.numel() for x in self._pixels))
        weights = self._weights * signs.to(self._weights)[:, None]
        found = torch.autograd.grad(
            self._tokens, self._pixels, weights, retain_graph=True, allow_unused=True
        )
        parts = [torch.zeros_like(x) if g is None else g for g, x in zip(found, self._pixels)]
        gradient = torch.cat([part.detach().flatten().float().cpu() for part in parts])
        return torch.where(gradient.abs() <= self._faint, 0.0, gradient)

    def split(self, numbers: Tensor) -> tuple[Tensor, ...]:
        """What belongs to each of the float tensors, as views."""
        return numbers.split([x.numel() for x in self._pixels])


def _owners(gradient: _Gradients, picture: Tensor) -> Owners:
    """Read the token of each number digit by digit, and those of shared ones token by token."""
    whole, tokens = gradient.whole, gradient.tokens
    numbers, owner = torch.arange(tokens), torch.zeros(len(whole), dtype=torch.long)
    alone, touched = whole != 0, whole != 0
    for digit in range(max(tokens - 1, 0).bit_length()):
        turned = gradient(1.0 - 2.0 * (numbers >> digit & 1))
        owner += torch.where(turned * whole < 0, 1 << digit, 0)
        alone &= (turned.abs() - whole.abs()).abs() <= ALONE * whole.abs()
        touched |= turned != 0
    kept = picture & _clear(gradient, owner, alone, touched & ~alone)
    (element,) = (alone & kept).nonzero(as_tuple=True)
    mine = Owners(owner[element], element, torch.ones(len(element)), tokens)
    shared = touched & ~alone & kept
    return _with_shared(mine, gradient, shared) if bool(shared.any()) else mine


def _clear(gradient: _Gradients, owner: Tensor, alone: Tensor, shared: Tensor) -> Tensor:
    """The numbers of tensors without shared ones, if these show every token; else all numbers.

    A model may see an image twice: in patches, and by convolutions that blur it.
    """
    clear = torch.zeros_like(alone)
    for part, is_shared in zip(gradient.split(clear), gradient.split(shared)):
        part.fill_(not bool(is_shared.any()))
    served = torch.bincount(owner[alone & clear], minlength=gradient.tokens) > 0
    rest = gradient((~served).float()).any()  # tokens that only the others show
    return torch.ones_like(clear) if bool(rest) else clear


def _with_shared(mine: Owners, gradient: _Gradients, shared: Tensor) -> Owners:
    """Add the numbers that several tokens share, from one gradient for each token."""
    (element,) = shared.nonzero(as_tuple=True)
    total, parts, found = torch.zeros(len(element)), [], 0
    for token in range(mine.tokens):
        size = gradient(torch.eye(mine.tokens)[token])[element].abs()
        total += size
        (at,) = (size > 0).nonzero(as_tuple=True)
        parts.append((at, size[at]))
        found += len(at)
        if found > MOST_SHARED * len(element):
            _refuse_blurred()
    token = torch.cat([torch.full_like(at, i) for i, (at, _) in enumerate(parts)])
    at = torch.cat([at for at, _ in parts])
    share = torch.cat([size for _, size in parts]) / total[at]
    return Owners(
        torch.cat([mine.token, token]),
        torch.cat([mine.element, element[at]]),
        torch.cat([mine.share, share]),
        mine.tokens,
    )


def _refuse_blurred() -> None:
    wanted = "visual tokens that each show a place of the image"
    fail("model", wanted, f"tokens that share each pixel with over {MOST_SHARED} others")
