"""Every precision of a Trainer under all three callbacks; compiled modules."""

import math

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision

from tests.callbacks.test_model_matrix import all_three, fit
from tests.helpers.kinds import KINDS, Kind, small_sgd
from tests.helpers.modules import Classifier, UserNetwork, mlp, pruned_max


def half_with_scaler():
    """What Lightning builds for 16-mixed on a GPU; on a CPU its own argument falls back to bf16."""
    return {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))}


PRECISIONS = {
    "32-true": (lambda: {"precision": "32-true"}, torch.float32),
    "bf16-mixed": (lambda: {"precision": "bf16-mixed"}, torch.float32),
    "16-mixed": (half_with_scaler, torch.float32),
    "64-true": (lambda: {"precision": "64-true"}, torch.float64),
    "bf16-true": (lambda: {"precision": "bf16-true"}, torch.bfloat16),
}


class Scales(Callback):
    """Whether steps were taken with scaled gradients, and with zeros where weights are pruned."""

    def __init__(self, pruner):
        self.pruner, self.scales, self.revived = pruner, [], 0

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.scales.append(None if scaler is None else scaler.get_scale())
        for name, mask in self.pruner.masks.items():
            self.revived += int(pl_module.get_parameter(name).grad[~mask].count_nonzero())


@pytest.mark.parametrize("model", ["mlp", "cnn with batch norm", "gpt, tied"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_masks_are_exact_and_kernels_keep_their_own_precision(precision, model, tmp_path):
    arguments, dtype = PRECISIONS[precision]
    prune, graphons, losses = all_three()
    scales = Scales(prune)
    trained, _, logger = fit(KINDS[model], prune, graphons, losses, scales, default_root_dir=tmp_path, **arguments())
    assert trained.get_parameter(next(iter(prune.masks))).dtype == dtype
    assert pruned_max(trained, prune.masks) == 0.0
    assert scales.revived == 0
    assert scales.scales == [256.0 if precision == "16-mixed" else None] * 3
    assert graphons.spectrum.eigenvalues.dtype == torch.float64
    assert graphons.spectrum.eigenvalues.isfinite().all()
    assert losses.curves["observed"].isfinite().all()
    assert losses._session.tracker.initial.kernels.dtype == torch.float64
    error = logger.series("loss_decay/relative_error")
    assert math.isfinite(error[2]) if 2 in error else logger.series("loss_decay/invalid_from")


def test_kernels_do_not_depend_on_mixed_precision(tmp_path):
    """The same weights have the same kernel, whatever training computes in."""
    spectra = []
    for precision in ("32-true", "bf16-mixed", "16-mixed"):
        prune, graphons, losses = all_three("random")
        arguments = {"default_root_dir": tmp_path, "max_steps": 1, **PRECISIONS[precision][0]()}
        *_, logger = fit(KINDS["mlp"], prune, graphons, losses, **arguments)
        spectra.append([logger.series(f"ntk/{key}")[0] for key in ("trace", "lambda_max", "lambda_min")])
    assert spectra[0] == spectra[1] == spectra[2]


def test_gradients_that_overflow_skip_the_step_and_revive_nothing(tmp_path):
    """GradScaler drops a step with infinite gradients; NaN times zero must not come back into a pruned weight."""

    class Overflows(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * (math.inf if self.trainer.training and batch_idx == 1 and loss.requires_grad else 1.0)

    prune, graphons, losses = all_three("magnitude")
    kind = Kind(lambda: Overflows(mlp, small_sgd))
    model, *_ = fit(kind, prune, graphons, losses, default_root_dir=tmp_path, **half_with_scaler())
    assert pruned_max(model, prune.masks) == 0.0
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("inside", [True, False], ids=["compiled network", "compiled module"])
def test_compiled_without_graph_breaks_and_at_most_one_recompilation(inside, tmp_path):
    """The network of a module, or the whole module, compiled; the analyses around training compile nothing."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    class Compiled(Classifier):
        def __init__(self):
            super().__init__(lambda: UserNetwork(mlp()), small_sgd)
            if inside:
                self.net.compile(backend=backend, fullgraph=True)

    torch._dynamo.reset()
    prune, graphons, losses = all_three()
    prune.batches = 1
    model = Compiled()
    fit_module = model if inside else torch.compile(model, backend=backend)
    kind = Kind(lambda: fit_module)
    _, trainer, logger = fit(kind, prune, graphons, losses, default_root_dir=tmp_path, max_epochs=2)
    assert trainer.global_step == 6
    assert pruned_max(model, prune.masks) == 0.0
    assert len(logger.series("loss_decay/observed")) == 7
    error = logger.series("loss_decay/relative_error")
    assert math.isfinite(error[2]) if 2 in error else logger.series("loss_decay/invalid_from")
    assert 1 <= len(compiled) <= 2
    torch._dynamo.reset()
