"""A frozen vision tower is neither recomputed nor differentiated when the model is checkpointed."""

from __future__ import annotations

import pytest
import torch

from groundkern.hf import detach
from tests.hf.training import attached_model, make_trainer


def first_gradients(folder, **overrides) -> tuple[dict[str, torch.Tensor], list[bool], int]:
    """Gradients of the first batch, whether the tower's outputs asked for one, and how often its
    first layer ran."""
    model = attached_model()
    model.model.visual.requires_grad_(False)
    trainer = make_trainer(model, folder, examine=False, **overrides)
    asked, runs = [], []
    model.model.visual.patch_embed.register_forward_hook(
        lambda _, args, output: asked.append(output.requires_grad)
    )
    model.model.visual.blocks[0].mlp.register_forward_hook(lambda *_: runs.append(1))
    model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    model(**batch).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    detach(model)
    return found, asked, len(runs)


@pytest.mark.parametrize("reentrant", [False, None])
def test_a_frozen_tower_runs_once(tmp_path, reentrant):
    wanted, _, _ = first_gradients(tmp_path / "plain", seed=1)
    how = {} if reentrant is None else {"use_reentrant": reentrant}
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": how}
    found, asked, runs = first_gradients(tmp_path / "checkpointed", seed=1, **options)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
    if reentrant is False:
        assert asked == [False]
        assert runs == 1
