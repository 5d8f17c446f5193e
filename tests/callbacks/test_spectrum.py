"""The tangent kernel's spectrum that GraphonMonitor logs."""

import logging

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_graphon._shared.batch_norm import batch_norms, settle_batch_norms
from lightning_graphon.callbacks import GraphonMonitor, SpectrumOptions
from lightning_graphon.callbacks._module.network import TrainingStepNetwork
from lightning_graphon.callbacks._module.pool import draw_probe
from lightning_graphon.callbacks._module.training_step import TrainingStepObjective
from lightning_graphon.ntk import empirical_ntk, graphon_ntk_from_model, spectral_summary
from tests.callbacks.test_graphon_monitor import fit, pruner, read_csv
from tests.callbacks.test_graphon_monitor import monitor as quiet_monitor
from tests.helpers.modules import Classifier, Gan, cnn, loader, make_trainer


def monitor(*, raise_errors=True, verbose=False, **spectrum):
    options = SpectrumOptions(**spectrum)
    return quiet_monitor(raise_errors=raise_errors, verbose=verbose, spectrum=options)


class StillClassifier(Classifier):
    """Learning rate zero: what the monitor saw at the end is what the test can compute again."""

    def __init__(self, net=None):
        super().__init__(**({"net": net} if net else {}), optimizer=lambda p: torch.optim.SGD(p, lr=0.0))


def find_network(trainer, pl_module, size, seed):
    """The network on a probe of any size, as the monitor reads it where there is time."""
    batch = draw_probe(trainer, pl_module, size, seed)
    return TrainingStepNetwork(pl_module, TrainingStepObjective(trainer, pl_module), batch)


def probe(model, size, seed=0):
    """Inputs that the monitor draws, by the same public dataloader."""
    trainer = make_trainer()
    found = []

    class Look(GraphonMonitor):
        def on_train_start(self, trainer, pl_module):
            found.append(find_network(trainer, pl_module, size, seed))

        def on_train_end(self, trainer, pl_module): ...

    trainer = make_trainer(Look(verbose=False, figure=False))
    trainer.fit(model, loader())
    return found[0]


@pytest.mark.parametrize(("given", "bins"), [({}, 9), ({"bins": 64}, 64)])
def test_graphon_ntk_of_a_chain(given, bins, tmp_path):
    prune, watch, model = pruner(), monitor(probe_size=40, **given), StillClassifier()
    fit(prune, watch, model=model, default_root_dir=tmp_path)
    inputs = next(iter(loader(batch_size=40)))[0]
    masks = {name.removeprefix("net."): mask for name, mask in prune.masks.items()}
    expected = spectral_summary(graphon_ntk_from_model(model.net, inputs, masks, bins=bins))
    assert watch.spectrum.eigenvalues.dtype == torch.float64
    torch.testing.assert_close(watch.spectrum.eigenvalues, expected.eigenvalues)


@pytest.mark.parametrize("net", [None, cnn], ids=["mlp", "cnn with batch norm"])
def test_empirical_kernel_of_anything_else(net, tmp_path):
    prune, watch, model = (
        pruner(),
        monitor(probe_size=24, ntk="empirical"),
        StillClassifier(net),
    )
    fit(prune, watch, model=model, default_root_dir=tmp_path)
    inputs = next(iter(loader(batch_size=24)))[0].double()
    masks = {name.removeprefix("net."): mask for name, mask in prune.masks.items()}
    settle_batch_norms(batch_norms(model.net.eval()).values(), lambda: model.net(inputs.float()))
    expected = spectral_summary(empirical_ntk(model.net.double(), inputs, masks=masks))
    torch.testing.assert_close(watch.spectrum.eigenvalues, expected.eigenvalues, rtol=1e-9, atol=1e-9)


def test_auto_falls_back_and_says_which(tmp_path, capsys):
    for net, words in ((None, "Graphon NTK (energy, float64)"), (cnn, "empirical NTK (float64)")):
        fit(monitor(verbose=True, probe_size=8), model=StillClassifier(net), default_root_dir=tmp_path)
        printed = " ".join(capsys.readouterr().out.split())
        assert words in printed
        cautions = printed.count("expect the kernel of this one network to differ from it by about")
        assert cautions == printed.count(": Graphon NTK") > 0  # at step 0 batch norm is fresh and has a limit


def test_keys_steps_and_files(tmp_path):
    watch = monitor(probe_size=16, every_n_epochs=1)
    trainer = fit(pruner(), watch, max_epochs=2, logger=CSVLogger(tmp_path), default_root_dir=tmp_path)
    rows = [row for row in read_csv(trainer) if row.get("ntk/decay_rate")]
    per_epoch = trainer.global_step // 2
    assert [int(row["step"]) for row in rows] == [0, per_epoch, 2 * per_epoch]
    keys = {"decay_rate", "effective_rank", "spectral_gap", "energy_top5", "lambda_max", "trace", "condition_number"}
    assert {f"ntk/{key}" for key in keys | {"alignment"}} <= set(rows[0])
    last = {key: float(rows[-1][f"ntk/{key}"]) for key in keys}
    assert last["effective_rank"] == pytest.approx(last["trace"] / last["lambda_max"])
    assert last["trace"] == pytest.approx(watch.spectrum.trace)
    with np.load(next(tmp_path.glob("**/ntk_spectrum/step_00000000.npz"))) as arrays:
        assert arrays["eigenvalues"].shape == (16,)


def test_probe_is_fixed_by_its_seed_whatever_the_shuffling():
    def inputs(seed, global_seed):
        torch.manual_seed(global_seed)
        found = []

        class Look(GraphonMonitor):
            def on_train_start(self, trainer, pl_module):
                found.append(find_network(trainer, pl_module, 20, seed).inputs)

            def on_train_end(self, trainer, pl_module): ...

        make_trainer(Look(verbose=False, figure=False)).fit(Classifier(), loader(shuffle=True))
        return found[0]

    assert torch.equal(inputs(1, 5), inputs(1, 6))
    assert not torch.equal(inputs(1, 5), inputs(2, 5))


def test_probe_has_labels_of_classification_batches():
    network = probe(Classifier(), 30)
    assert network.inputs.shape == (30, 64)
    expected = next(iter(loader(batch_size=30)))
    assert torch.equal(network.inputs, expected[0])
    assert torch.equal(network.labels, expected[1])


def test_networks_without_one_output_are_refused_in_one_sentence(tmp_path, caplog):
    watch = monitor(raise_errors=False)
    with caplog.at_level(logging.WARNING, logger="lightning_graphon"):
        fit(watch, model=Gan(), default_root_dir=tmp_path)
    assert "has 3 outputs, of several networks" in caplog.text
    assert "Traceback" not in caplog.text
    assert watch.graphons, "the graphons are there all the same"
    assert watch.spectrum is None


def test_training_is_the_same_with_and_without(tmp_path):
    models = [Classifier(cnn), Classifier(cnn)]
    for model, watch in zip(models, ([monitor(every_n_epochs=1)], []), strict=True):
        torch.manual_seed(0)  # dropout
        fit(pruner(), *watch, model=model, max_epochs=2, default_root_dir=tmp_path)
    with_monitor, without = (model.state_dict() for model in models)
    assert all(torch.equal(value, without[name]) for name, value in with_monitor.items())


def test_none_computes_nothing(tmp_path):
    watch = quiet_monitor()
    fit(watch, default_root_dir=tmp_path)
    assert watch.spectrum is None


def test_bad_arguments():
    with pytest.raises(ValueError, match="unknown ntk 'graphn'. Did you mean 'graphon'"):
        GraphonMonitor(spectrum=SpectrumOptions(ntk="graphn"))
    with pytest.raises(ValueError, match="probe_size must be at least 1"):
        GraphonMonitor(spectrum=SpectrumOptions(probe_size=0))
