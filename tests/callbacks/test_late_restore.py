"""Strategies that restore a checkpoint late, and callbacks that travel without their module."""

import pytest
from lightning.pytorch.strategies import SingleDeviceStrategy

from tests.helpers.modules import (
    Classifier,
    loader,
    make_trainer,
    quiet,
    sgd,
)


def test_pickled_callback_does_not_carry_the_module():
    import copy
    import pickle

    pruner = quiet("snip")
    model = Classifier(optimizer=lambda p: sgd(p))  # a module that cannot be pickled
    make_trainer(pruner).fit(model, loader())
    restored = pickle.loads(pickle.dumps(pruner))
    assert restored.masks == pruner.masks
    assert not any(getattr(v, "__self__", None) is not None for v in copy.copy(pruner).__getstate__().values())
    assert len(pickle.dumps(pruner)) < 20_000


class RestoresAfterSetup(SingleDeviceStrategy):
    @property
    def restore_checkpoint_after_setup(self):
        return True


@pytest.mark.parametrize("pruned", [True, False])
def test_late_restore(pruned, tmp_path, monkeypatch):
    """fit(ckpt_path=...) leaves trainer.ckpt_path None during on_fit_start when the strategy restores later."""
    first = [quiet("snip")] if pruned else []
    trainer = make_trainer(*first)
    dense = Classifier()
    trainer.fit(dense, loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    expected = quiet("snip")
    make_trainer(expected).fit(dense, loader())
    from lightning_graphon.callbacks._module import scoring as module

    count = []
    real = module.compute_masks
    monkeypatch.setattr(module, "compute_masks", lambda *a, **k: count.append(1) or real(*a, **k))
    pruner = quiet("snip")
    strategy = RestoresAfterSetup(device="cpu")
    make_trainer(pruner, strategy=strategy, max_epochs=2).fit(
        Classifier(seed=9), loader(), ckpt_path=tmp_path / "a.ckpt"
    )
    assert len(count) == (0 if pruned else 1)
    assert pruner.masks == (first[0].masks if pruned else expected.masks)
