"""Public functions say which argument they cannot use: each is called with one bad value at a time."""

import inspect
import re

import numpy as np
import pytest
import torch
from torch import nn

from lightning_graphon import dynamics, graphon, metrics, ntk, plots, pruning, report

NET = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
MASK = torch.rand(8, 6, generator=torch.Generator().manual_seed(0)) < 0.5
MASKS = {"0.weight": MASK, "2.weight": torch.ones(3, 8, dtype=torch.bool)}
W = graphon.estimate_graphon(MASK, bins=4)
X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
KERNEL = (X @ X.T).double()
LABELS = torch.tensor([0, 1, 2, 1, 0])
SGD = torch.optim.SGD(NET.parameters(), lr=0.1)
LOSSES = torch.linspace(2, 1, 5)
CURVES = {"observed": {0: 2.0, 5: 1.0}, "predicted": {0: 2.0, 5: 1.1}}
VIEW = dynamics.OptimizerView(SGD, NET)


def square(outputs, targets=None):
    return outputs.square().mean()


# Arguments with which a function does its work.
CALLS = {
    graphon.StepGraphon: {"values": W.values, "row_measure": None, "energy": None, "sparse_cells": None},
    graphon.common_refinement: {"a": W, "b": W},
    graphon.estimate_graphon: {"mask": MASK, "bins": 4, "smoothing": 0.0, "groups": 1},
    graphon.layer_graphons: {"masks": MASKS, "model": None, "bins": 4, "inputs": None},
    graphon.as_graphon: {"spec": 0.5},
    graphon.block: {"values": W.values, "density": 0.4},
    graphon.constant: {"density": 0.5},
    graphon.power_law: {"density": 0.1, "exponent": 0.5, "bins": 4},
    graphon.product: {"density": 0.1, "power": 1.0, "bins": 4},
    graphon.values_at_density: {"log_odds": torch.zeros(3, 4), "density": 0.5, "row_measure": None},
    graphon.coordinate_relevance: {"x": X, "labels": LABELS},
    graphon.input_path_density: {"layers": list(MASKS.values())},
    graphon.ScaledSaliency: {"scales": torch.ones(3, 4), "noise": torch.rand(9)},
    graphon.fit_factorised_saliency: {"scores": torch.rand(8, 6)},
    graphon.limit_distances: {"scores": {n: torch.rand(m.shape) for n, m in MASKS.items()}, "masks": MASKS, "bins": 4},
    graphon.predicted_graphons: {"layers": {"a": torch.rand(8, 6)}, "sparsity": 0.5, "bins": 4},
    graphon.active_inputs: {"first": MASK},
    graphon.covered_order: {"first": MASK, "units": None},
    graphon.dead_units: {"first": MASK},
    graphon.effective_inputs: {"first": MASK},
    graphon.rectangle_certificate: {"first": MASK, "inputs": (0, 1), "units": None, "needed": 1.0},
    graphon.convergence_conditions: {"runs": [torch.rand(8, 6), torch.rand(16, 12)], "density": 0.2},
    graphon.weight_spectrum: {"weight": X, "mask": None, "bins": 2, "resolution": 8},
    graphon.expressivity_table: {"layers": {"a": MASK}, "sizes": (1, 2)},
    graphon.common_neighbour_count: {"first": MASK, "inputs": (0, 1), "units": None},
    graphon.mean_common_neighbour_count: {"first": MASK, "size": 2, "units": None},
    graphon.cut_distance: {"a": W, "b": W, "align": True, "restarts": 2, "seed": 0},
    graphon.cut_norm: {"values": W.values - 0.5, "row_measure": None, "restarts": 2, "iterations": 5, "seed": 0},
    graphon.l1_distance: {"a": W, "b": W, "align": True},
    graphon.l2_distance: {"a": W, "b": W, "align": True},
    graphon.homogeneity_test: {"mask": MASK, "alpha": 0.01, "draws": 19, "seed": 0},
    graphon.motif_densities: {"graph": MASK},
    graphon.score_limits: {"masks": {"0.weight": MASK}, "scores": {"0.weight": MASK.double()}, "bins": 2},
    graphon.path_density: {"layers": [W, W]},
    ntk.DenseOperator: {"matrix": KERNEL},
    ntk.EmpiricalNTK: {"model": NET, "x": X, "masks": MASKS, "batch": None},
    ntk.HermiteDual: {"function": torch.tanh, "derivative": None, "degree": 8},
    ntk.KroneckerKernel: {"samples": KERNEL, "outputs": torch.eye(3).double()},
    ntk.PiecewiseLinear: {"constant": 0.0, "slope": 0.5, "bends": [(0.0, 1.0)]},
    ntk.ReLULike: {"negative": 0.0, "positive": 1.0},
    ntk.design_graphons: {
        "x": X, "density": 0.5, "outputs": 2, "hidden": (3,), "labels": LABELS % 2, "steps": 1, "lr": 0.1, "seed": 0,
    },
    ntk.dual_activation: {"activation": "relu"},
    ntk.empirical_nngp: {"model": NET, "x": X, "masks": MASKS, "x2": None},
    ntk.empirical_ntk: {"model": NET, "x": X, "masks": MASKS, "x2": None, "preconditioner": None, "max_memory": None},
    ntk.generalisation_bound: {"kernel": KERNEL + torch.eye(5).double(), "targets": LABELS % 2 * 2 - 1.0, "ridge": 0.1},
    ntk.expected_error: {"masks": MASKS},
    ntk.graphon_ntk: {"x": X[:, :4], "graphons": [W], "weight_variance": 2.0, "bias_variance": 0.0, "x2": None},
    ntk.graphon_ntk_from_model: {"model": NET, "x": X, "masks": MASKS, "bins": 4, "x2": None, "weight_variance": None},
    ntk.kernel_ridge_regression: {"kernel_train": KERNEL, "targets": LOSSES, "kernel_test": KERNEL, "ridge": 0.1},
    ntk.kernel_target_alignment: {"kernel": KERNEL, "labels": LABELS},
    ntk.kronecker_ntk: {"model": NET, "x": X, "masks": MASKS, "preconditioner": None},
    ntk.ntk_layer_shares: {"model": NET, "x": X, "masks": MASKS, "preconditioner": None},
    ntk.one_vs_rest_targets: {"labels": LABELS},
    ntk.sampled_ntk: {"model": NET, "x": X, "masks": MASKS, "draws": 2, "seed": 0, "x2": None, "max_memory": None},
    ntk.spectral_summary: {"kernel": KERNEL, "labels": LABELS, "k": 3},
    ntk.top_eigenpairs: {"kernel": KERNEL, "k": 2, "tolerance": 1e-6, "seed": 0},
    pruning.Masks: {"masks": MASKS},
    pruning.PruningConfig: {"method": "snip", "sparsity": 0.5, "allocation": "global", "steps": None, "seed": 0},
    pruning.as_masks: {"masks": MASKS},
    pruning.prune: {
        "model": NET, "method": "magnitude", "sparsity": 0.5, "allocation": "global", "steps": None, "include": None,
        "exclude": None, "min_density": None, "seed": 0, "options": None,
    },
    pruning.read_masks: {"model": NET, "include": None, "exclude": None},
    pruning.rescale_: {"model": NET, "masks": pruning.Masks(MASKS), "by": "unit"},
    pruning.select_weights: {"model": NET, "include": None, "exclude": None},
    pruning.sparsity_of: {"allocation": "global", "sparsity": 0.5},
    pruning.theoretical_macs: {"model": NET, "inputs": X, "masks": MASKS},
    metrics.fitted_decay_rate: {"loss": LOSSES, "step": torch.arange(5)},
    metrics.log_correlation: {"predicted": LOSSES, "observed": LOSSES},
    metrics.loss_decay_errors: {"predicted": LOSSES, "observed": LOSSES},
    metrics.loss_decay_summary: {"predicted": LOSSES, "observed": LOSSES, "step": torch.arange(5), "tolerance": 0.1},
    metrics.LossDecay: {"tolerance": 0.1, "max_points": 8, "prefix": ""},
    dynamics.KernelPrediction: {"ntk": "empirical", "start_step": None, "change_every_n_steps": 20},
    dynamics.LossDecayPredictor: {
        "kernel": KERNEL, "outputs": X[:, :2], "targets": None, "loss_fn": square, "momentum": 0.0, "check_every": 1,
    },
    dynamics.LossBand: {"kernel": KERNEL, "outputs": X, "targets": None, "loss_fn": square, "dataset_size": 50},
    dynamics.OptimizerView: {"optimizer": SGD, "module": NET},
    dynamics.ProbedNetwork: {"module": NET, "inputs": X, "loss": square, "masks": MASKS},
    dynamics.finite_probe_kernel: {"kernel": KERNEL, "outputs": X, "dataset_size": 50},
    dynamics.gp_posterior: {"prior": KERNEL, "targets": LOSSES[:3], "ntk": KERNEL, "times": 3, "lr": 0.1, "ridge": 0},
    dynamics.linearize: {"model": NET},
    dynamics.taylor_expand: {"model": NET, "order": 1},
    dynamics.power_law: {"steps": torch.arange(5), "losses": LOSSES, "at": torch.arange(3)},
    dynamics.relative_error: {"predicted": 1.0, "observed": 2.0},
    dynamics.next_multiple: {"every": 5, "before": 3},
    dynamics.optimizer_preconditioner: {"optimizer": SGD, "model": NET},
    dynamics.read_optimizer_step: {"optimizer": SGD},
    dynamics.extrapolate_widths: {"wider": LOSSES, "narrower": LOSSES, "ratios": (0.25, 0.125)},
    dynamics.redraw_from_graphons: {"model": NET, "masks": MASKS, "width": 0.5, "bins": 4, "seed": 0, "fields": "WED"},
    dynamics.sibling_optimizer: {"optimizer": SGD, "model": NET, "sibling": dynamics.redraw_from_graphons(NET, MASKS)},
    dynamics.stability_limit: {"momentum": 0.9, "nesterov": False, "dampening": 0.0},
    plots.graphon_image: {"graphons": {"a": W}, "tests": None, "title": "", "scale": 1.0},
    plots.plot_graphon_flow: {"flows": {"a": graphon.LayerFlow(MASK).points}, "title": ""},
    plots.plot_graphons: {"graphons": {"a": W}, "tests": None, "title": ""},
    plots.plot_loss_decay: {"curves": CURVES, "band": None, "invalid_from": None, "shares": None},
    plots.plot_loss_decays: {"curves": {"a": CURVES}, "invalid_from": None},
    plots.plot_masks: {"masks": {"snip": MASKS}},
    plots.plot_spectrum: {"spectrum": ntk.spectral_summary(KERNEL, k=3)},
    plots.plot_weight_spectrum: {"spectrum": graphon.weight_spectrum(X, resolution=8)},
    plots.sort_by_degree: {"mask": MASK},
    plots.spectrum_image: {"spectrum": ntk.spectral_summary(KERNEL, k=3), "scale": 1.0},
    report.write_report: {"run_dir": "there is none"},
}  # fmt: skip

BAD = {
    "None": None,
    "object": object(),
    "text": "text",
    "number": 5,
    "negative": -1,
    "nan": float("nan"),
    "numpy": np.ones((4, 4)),
    "numpy bool": np.ones((4, 4), bool),
    "numpy objects": np.array([None, "a"]),
    "no axes": torch.tensor(1.0),
    "one axis": torch.ones(3),
    "three axes": torch.ones(2, 2, 2),
    "empty": torch.ones(0, 4),
    "nothing": torch.ones(0),
    "not finite": torch.full((5, 6), float("nan")),
    "infinite": torch.full((5, 5), float("inf")).double(),
    "meta": torch.ones(4, 4, device="meta"),
    "integers": torch.ones(5, 6, dtype=torch.int64),
    "complex": torch.ones(5, 5, dtype=torch.complex64),
    "halves": torch.ones(5, 5, dtype=torch.float16),
    "list": [1, "a"],
    "empty list": [],
    "empty dict": {},
    "dict": {"0.weight": None},
    "dict of numpy": {"0.weight": np.ones((8, 6), bool)},
    "dict of meta": {"0.weight": torch.ones(8, 6, device="meta")},
    "meta module": nn.Linear(6, 8, device="meta"),
    "other module": nn.LSTM(3, 2),
}


# Take nothing that could be wrong, a trainer's own objects, or matplotlib's.
LEFT = {
    "beginning_masks", "growth_methods", "local_shard", "register_growth",
    "check_readable", "compute_masks", "few_ticks", "full_tensor", "is_sharded", "methods", "new_figure",
    "find_copies", "p_value_text", "plot_graphon_grid", "plot_input_density", "register_activation", "register_layer",
    "register_method", "summon_full_params", "transport_distance", "unregister_activation",
    "without_copies", "world_tile_shard", "first_outside", "lazy_until", "rehearse", "replay", "scale_updates",
    "kernel_to_file", "taylor_expand_", "train_copies",
}  # fmt: skip
# Words of messages that were written for their reader: they may name what was wrong by another word.
PLAIN = re.compile(r"must|give|does not fit|no |unknown|cannot|different|needs|non-negative|Invalid")
# A function of the caller's fails in its own way.
OWN_FAULTS = {
    ("prune", "method"), ("LossDecayPredictor", "loss_fn"), ("LossBand", "loss_fn"), ("theoretical_macs", "inputs"),
}  # fmt: skip


def fault(function, name, value):
    """What is unclear when an argument has this value."""
    try:
        function(**{**CALLS[function], name: value})
    except (ValueError, TypeError, KeyError, FileNotFoundError) as error:
        return "" if name.rstrip("s") in str(error) or PLAIN.search(str(error)) else f"not named in {error!r}"
    except Exception as error:
        return f"raw {error!r:.150}"
    return ""


@pytest.mark.parametrize("function", CALLS, ids=lambda function: function.__name__)
@pytest.mark.filterwarnings("ignore")
def test_a_bad_value_is_named(function):
    if function is not report.write_report:
        function(**CALLS[function])
    faults = {(n, kind): fault(function, n, value) for n in CALLS[function] for kind, value in BAD.items()}
    assert not {k: f for k, f in faults.items() if f and (function.__name__, k[0]) not in OWN_FAULTS}


def test_all_public_functions_are_called():
    packages = (graphon, ntk, pruning, metrics, dynamics, plots, report)
    offered = [o for m in packages for o in map(m.__dict__.get, m.__all__) if inspect.isfunction(o)]
    assert {o.__name__ for o in offered if o not in CALLS} == LEFT
