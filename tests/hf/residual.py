"""The residual stream taken apart: an oracle for the sum rule of logit contributions."""

from __future__ import annotations

from contextlib import contextmanager

import torch

from tests.hf.rows import rows_of


class ResidualParts:
    """x^0 and what every FFN adds, of one run, and their share of a logit."""

    def __init__(self, model) -> None:
        self.model = getattr(model, "get_base_model", lambda: model)()
        self.added: list[torch.Tensor] = []
        self.last: torch.Tensor | None = None

    @contextmanager
    def recorded(self):
        decoder = self.model.get_decoder()

        def branch_output(_, __, output):
            self.added.append(output)

        def first_input(_, args):
            self.added.append(args[0])

        def last_stream(_, args):
            self.last = args[0] if self.last is None else self.last

        hooks = [decoder.layers[0].register_forward_pre_hook(first_input)]
        hooks.append(decoder.norm.register_forward_pre_hook(last_stream))
        for layer in decoder.layers:
            branch = getattr(layer, "post_feedforward_layernorm", layer.mlp)
            hooks.append(branch.register_forward_hook(branch_output))
        yield
        for hook in hooks:
            hook.remove()

    def along_the_logit(self, position, token) -> torch.Tensor:
        """[B, R]: all that is not attention over keys, along d logit / d x^L with norms held."""
        norm, head = self.model.get_decoder().norm, self.model.get_output_embeddings()
        x = rows_of(self.last, position).detach()
        mean = x.mean(-1, keepdim=True) if "LayerNorm" in type(norm).__name__ else None
        eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
        rms = ((x if mean is None else x - mean).square().mean(-1, keepdim=True) + eps).sqrt()
        weight = norm.weight + (1.0 if "Gemma" in type(norm).__name__ else 0.0)
        with torch.enable_grad():
            h = norm(x).detach().requires_grad_()
            (u,) = torch.autograd.grad(head(h).gather(2, token[..., None]).sum(), h)
        d = u * weight / rms
        d = d if mean is None else d - d.mean(-1, keepdim=True)
        added = sum((rows_of(part, position) * d).sum(-1) for part in self.added)
        biases = (getattr(layer.self_attn.o_proj, "bias", None) for layer in self.layers)
        return added + sum((bias * d).sum(-1) for bias in biases if bias is not None)

    @property
    def layers(self):
        return self.model.get_decoder().layers
