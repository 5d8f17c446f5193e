"""Arguments as sweeps and configurations give them: numbers of numpy, sequences that are no lists."""

from collections.abc import Sequence

import numpy as np
import pytest

from lightning_graphon.callbacks import GraphonMonitor, LossDecayMonitor, PruneAtInit, SpectrumOptions
from lightning_graphon.dynamics import KernelPrediction
from tests.helpers.modules import Classifier, loader, make_trainer, pruned_max, quiet

SPECTRUM = SpectrumOptions(probe_size=np.int64(8), bins=np.int64(4))
KERNEL = KernelPrediction(start_step=np.int64(0), change_tolerance=np.float32(0.5))


class ListConfig(Sequence):
    """As OmegaConf's: a sequence that is no list."""

    def __init__(self, *items):
        self.items = items

    def __getitem__(self, index):
        return self.items[index]

    def __len__(self):
        return len(self.items)


CASES = {
    "sparsity": lambda: quiet("magnitude", np.float32(0.5)),
    "allocation": lambda: quiet("magnitude", allocation={"net.0": np.float64(0.5)}),
    "method": lambda: quiet(np.array(["magnitude"])[0]),
    "whole numbers": lambda: quiet("snip", steps=np.int64(2), seed=np.int32(1), batches=np.int64(2)),
    "min_density": lambda: quiet("magnitude", min_density=np.float32(0.05)),
    "rescale": lambda: quiet("magnitude", rescale=np.array(["unit"])[0]),
    "include": lambda: quiet("magnitude", include=np.array(["net.0"])[0]),
    "monitor": lambda: LossDecayMonitor(
        probe_size=np.int64(16), probe_seed=np.int64(1), every_n_steps=np.int64(1), tolerance=np.float64(0.1),
        kernel=KERNEL, verbose=False, raise_errors=True,
    ),
    "graphons": lambda: GraphonMonitor(
        bins=np.int64(8), every_n_steps=np.int64(1), spectrum=SPECTRUM, verbose=False, raise_errors=True
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:layer collapse")
def test_numbers_of_numpy_are_resumed(name, tmp_path):
    first = make_trainer(CASES[name](), default_root_dir=tmp_path)
    first.fit(Classifier(), loader())
    first.save_checkpoint(tmp_path / "a.ckpt")
    again = make_trainer(CASES[name](), max_epochs=2, default_root_dir=tmp_path)
    again.fit(Classifier(), loader(), ckpt_path=tmp_path / "a.ckpt")
    assert again.current_epoch == 2


@pytest.mark.parametrize("form", [tuple, ListConfig, list])
def test_sequences_of_patterns(form, tmp_path):
    """A checkpoint of one form is resumed with another."""
    first = make_trainer(quiet("magnitude", include=["net.0", "net.2"], exclude=["net.2.weight"]))
    first.fit(Classifier(), loader())
    first.save_checkpoint(tmp_path / "a.ckpt")
    values = (lambda *items: form(items)) if form is not ListConfig else ListConfig
    pruner, model = quiet("magnitude", include=values("net.0", "net.2"), exclude=values("net.2.weight")), Classifier()
    make_trainer(pruner, max_epochs=2).fit(model, loader(), ckpt_path=tmp_path / "a.ckpt")
    assert list(pruner.masks) == ["net.0.weight"]
    assert pruned_max(model, pruner.masks) == 0.0


def test_another_checkpoint_is_tested_as_it_is(tmp_path):
    """A network that was pruned in another way, and a dense one."""
    pruner, model = quiet("magnitude", 0.5), Classifier()
    trainer = make_trainer(pruner)
    trainer.fit(model, loader())
    masks = pruner.masks
    for name, callback in (("sparse", PruneAtInit("magnitude", 0.8, verbose=False)), ("dense", None)):
        other = make_trainer(*([callback] if callback else []))
        other.fit(Classifier(seed=3), loader())
        other.save_checkpoint(tmp_path / name)
        expected = {k: v.clone() for k, v in other.lightning_module.state_dict().items()}
        model.test_step = lambda *args: None
        trainer.test(model, loader(), ckpt_path=tmp_path / name, verbose=False)
        assert all((tensor == expected[key]).all() for key, tensor in model.state_dict().items())
        assert pruner.masks == masks
