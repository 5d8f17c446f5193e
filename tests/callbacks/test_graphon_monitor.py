"""GraphonMonitor on every kind of sparse network, logger and callback order."""

import csv
import io
import logging
import math

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ModelPruning
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from torch import nn
from torch.nn.utils.prune import l1_unstructured
from torch.utils.data import DataLoader

from lightning_graphon.callbacks import DynamicSparsity, GraphonMonitor, PruneAtInit
from lightning_graphon.callbacks._analysis.time_budget import TimeBudget
from lightning_graphon.callbacks._logging.images import send_picture
from lightning_graphon.graphon import LayerFlow, constant, estimate_graphon, homogeneity_test, l2_distance
from lightning_graphon.plots.graphon_images import graphon_image
from tests.callbacks.test_checkpoints import SAFELY
from tests.helpers.modules import Classifier, cnn, loader, make_trainer

LAYERS = ["net.0.weight", "net.2.weight", "net.4.weight"]


def monitor(**kwargs):
    return GraphonMonitor(**{"verbose": False, "raise_errors": True, "spectrum": None, **kwargs})


def pruner(method="snip", sparsity=0.8):
    return PruneAtInit(method, sparsity=sparsity, verbose=False)


def fit(*callbacks, model=None, **kwargs):
    trainer = make_trainer(*callbacks, **kwargs)
    trainer.fit(model or Classifier(), loader())
    return trainer


@pytest.mark.parametrize("first", [True, False])
def test_any_order_with_prune_at_init(first, tmp_path):
    prune, watch = pruner(), monitor()
    fit(*((prune, watch) if first else (watch, prune)), default_root_dir=tmp_path)
    assert list(watch.graphons) == LAYERS
    for name, graphon in watch.graphons.items():
        assert graphon == estimate_graphon(prune.masks[name])
        assert watch.tests[name] == homogeneity_test(prune.masks[name])


def test_dense_network_has_graphon_one(tmp_path):
    watch = monitor()
    fit(watch, default_root_dir=tmp_path)
    # Cell means are sums of rational weights: one to rounding.
    assert all(float((g.values - 1).abs().max()) < 1e-12 for g in watch.graphons.values())


@pytest.mark.parametrize("first", [True, False])
def test_model_pruning_is_followed_while_it_prunes(first, tmp_path):
    theirs = ModelPruning("l1_unstructured", amount=0.5, parameters_to_prune=None, use_lottery_ticket_hypothesis=False)
    watch = monitor()
    trainer = fit(
        *((theirs, watch) if first else (watch, theirs)),
        max_epochs=2,
        logger=CSVLogger(tmp_path),
        default_root_dir=tmp_path,
    )
    densities = [g.density for g in watch.graphons.values()]
    assert max(densities) < 0.9, "the last look is after the last pruning"
    moved = [row for row in read_csv(trainer) if row.get(f"graphon/{LAYERS[0]}/moved")]
    assert moved, "masks changed, so the distance to the look before is logged"
    assert all(float(row[f"graphon/{LAYERS[0]}/moved"]) > 0 for row in moved)


def test_layers_pruned_again_in_training_show_what_is_left_if_weights_are_read(tmp_path):
    again = ModelPruning("random_unstructured", amount=0.5, use_lottery_ticket_hypothesis=False, verbose=0)
    watch, model = monitor(include="*"), Classifier()
    fit(pruner("random", 0.5), again, watch, model=model, max_epochs=2, default_root_dir=tmp_path)
    for name in LAYERS:
        left = float((model.get_parameter(name) != 0).double().mean())
        assert 0.1 < left < 0.4
        assert watch.graphons[name].density == pytest.approx(left, abs=1e-12)


@pytest.mark.parametrize("inference", [False, True])
def test_a_mask_of_prune_at_init_that_somebody_writes_to_is_seen(inference, tmp_path):
    class Rewrite(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 1:
                with torch.inference_mode(inference):
                    prune.masks[LAYERS[0]].fill_(True)

    shape = Classifier().state_dict()[LAYERS[0]].shape
    with torch.inference_mode(inference):
        prune = PruneAtInit.from_masks({LAYERS[0]: torch.eye(*shape).bool()}, verbose=False)
    trainer = fit(
        prune, Rewrite(), monitor(every_n_steps=1), max_epochs=1, logger=CSVLogger(tmp_path), default_root_dir=tmp_path
    )
    rows = [row for row in read_csv(trainer) if row.get(f"graphon/{LAYERS[0]}/density")]
    assert [float(row[f"graphon/{LAYERS[0]}/density"]) for row in rows] == pytest.approx([1 / max(shape), 1.0])


def test_moved_is_the_distance_between_looks(tmp_path):
    class CutRow(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            with torch.no_grad():
                pl_module.net[0].weight[: 8 * (trainer.current_epoch + 1)] = 0

    model = Classifier(optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    watch = monitor()
    trainer = fit(watch, CutRow(), model=model, max_epochs=2, logger=CSVLogger(tmp_path), default_root_dir=tmp_path)
    before, after = (torch.ones(32, 64, dtype=torch.bool) for _ in range(2))
    before[:8] = False
    after[:16] = False
    expected = l2_distance(estimate_graphon(after), estimate_graphon(before), align=False)
    rows = [float(r[f"graphon/{LAYERS[0]}/moved"]) for r in read_csv(trainer) if r.get(f"graphon/{LAYERS[0]}/moved")]
    assert rows[-1] == pytest.approx(expected, rel=1e-6)  # CSV keeps all digits of a float
    assert watch.graphons[LAYERS[0]].density == pytest.approx(0.5)


def test_nothing_is_computed_while_masks_stay(tmp_path, monkeypatch):
    calls = []
    import lightning_graphon.callbacks.graphon_monitor as module

    original = module.layer_graphons
    monkeypatch.setattr(module, "layer_graphons", lambda *a, **k: calls.append(1) or original(*a, **k))
    fit(pruner(), monitor(every_n_steps=1), max_epochs=3, default_root_dir=tmp_path)
    assert len(calls) == len(LAYERS)


def test_scalars_and_figure_in_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    prune, watch = pruner(), monitor(layer_scalars=True)
    fit(prune, watch, logger=TensorBoardLogger(tmp_path, name="", version=""), default_root_dir=tmp_path)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["images"] == ["graphons", *(f"graphons/{name}" for name in LAYERS)]
    (shown,) = events.Images("graphons")
    drawn = np.asarray(graphon_image(watch.graphons, watch.tests, "Layer graphons at step 0", scale=1.5))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(shown.encoded_image_string)).convert("RGB")), drawn)
    assert (shown.step, shown.height, shown.width) == (0, *drawn.shape[:2])
    for name in LAYERS:
        test = homogeneity_test(prune.masks[name])
        for key, value in {
            "density": float(prune.masks[name].float().mean()),
            "c4_ratio": test.c4_ratio,
            "degree_cv": max(test.row_degree_cv, test.col_degree_cv),
            "p_value": test.p_value,
        }.items():
            (event,) = events.Scalars(f"graphon/{name}/{key}")
            assert event.value == pytest.approx(value, rel=1e-5, abs=1e-30)  # TensorBoard keeps float32
            assert event.step == 0
    assert not list(tmp_path.glob("**/*.npz"))


def image_tags(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    steps = {}
    for path in folder.glob("**/events*"):
        events = EventAccumulator(str(path), size_guidance={"images": 0})
        events.Reload()
        steps.update({tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]})
    return steps


def test_layers_are_drawn_once_and_of_many_a_few(tmp_path):
    class Cut(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            with torch.no_grad():
                pl_module.net[2 * (trainer.global_step % 9)].weight[: trainer.global_step] = 0

    def deep():
        return nn.Sequential(
            nn.Linear(64, 8), *(m for _ in range(8) for m in (nn.ReLU(), nn.Linear(8, 8))), nn.Linear(8, 10)
        )

    watch = monitor(every_n_steps=1)
    model = Classifier(deep, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    logger = TensorBoardLogger(tmp_path, name="", version="")
    fit(watch, Cut(), model=model, max_epochs=2, logger=logger, default_root_dir=tmp_path)
    steps = image_tags(tmp_path)
    assert len(watch.graphons) == 10
    assert len(set(steps.pop("graphons"))) > 4
    shown = [list(watch.graphons)[i] for i in (0, 1, 3, 5, 7, 9)]
    assert len(steps.pop("graphon_flow")) == 1  # masks changed
    assert steps == {f"graphons/{name}": [0] for name in shown}


@pytest.mark.parametrize("logger", ["none", "csv"])
def test_files_where_no_logger_takes_pictures(logger, tmp_path):
    watch = monitor()
    trainer = fit(pruner(), watch, logger=False if logger == "none" else CSVLogger(tmp_path), default_root_dir=tmp_path)
    (picture,) = tmp_path.glob("**/graphons/step_00000000.png")
    assert picture.stat().st_size > 1000
    with np.load(picture.with_suffix(".npz")) as arrays:
        assert set(arrays.files) == set(LAYERS)
        assert np.array_equal(arrays[LAYERS[0]], watch.graphons[LAYERS[0]].values.numpy())
    assert logger == "none" or str(picture).startswith(str(trainer.log_dir))


@pytest.mark.parametrize("images", [True, False])
def test_a_picture_goes_to_all_loggers_that_take_one(images, tmp_path):
    boards = [TensorBoardLogger(tmp_path, name=name) for name in "ab"] if images else []
    trainer = make_trainer(logger=[*boards, CSVLogger(tmp_path)], default_root_dir=tmp_path)
    send_picture(trainer, "tag", Image.new("RGB", (4, 4)), {})
    for board in boards:
        board.experiment.flush()
    assert [len(image_tags(tmp_path / name)) for name in "ab"] == ([1, 1] if images else [0, 0])
    assert bool(list(tmp_path.glob("**/tag/*.png"))) != images


def test_loggers_with_log_image_get_pixels(tmp_path):
    class Wandb(CSVLogger):
        images = ()

        def log_image(self, key, images, step=None):
            self.images = (*self.images, (key, images[0].shape[-1], step))

    logger = Wandb(tmp_path)
    fit(pruner(), monitor(), logger=logger, default_root_dir=tmp_path)
    assert logger.images == (("graphons", 3, 0), *((f"graphons/{name}", 3, 0) for name in LAYERS))


def test_convolutions_batch_norm_and_include(tmp_path):
    watch = monitor(include="Conv2d")
    fit(pruner("synflow"), watch, model=Classifier(cnn), default_root_dir=tmp_path)
    assert list(watch.graphons) == ["net.1.weight", "net.4.weight"]


def test_training_is_the_same_with_and_without(tmp_path):
    with_monitor, without = Classifier(), Classifier()
    fit(pruner(), monitor(every_n_steps=1), model=with_monitor, default_root_dir=tmp_path)
    fit(pruner(), model=without, default_root_dir=tmp_path)
    for a, b in zip(with_monitor.parameters(), without.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("fatal", [True, False])
def test_an_error_in_the_analysis_does_not_end_the_fit_unless_asked(fatal, tmp_path, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise RuntimeError("broken estimate")

    monkeypatch.setattr("lightning_graphon.callbacks.graphon_monitor.layer_graphons", broken)
    watch = monitor(raise_errors=fatal)
    if fatal:
        with pytest.raises(RuntimeError, match="broken estimate"):
            fit(watch, default_root_dir=tmp_path)
        return
    with caplog.at_level(logging.ERROR, logger="lightning_graphon"):
        trainer = fit(watch, default_root_dir=tmp_path)
    assert trainer.global_step > 0
    assert "broken estimate" in caplog.text


def test_table_is_printed_once(tmp_path, capsys):
    fit(pruner(), monitor(verbose=True), max_epochs=2, default_root_dir=tmp_path)
    assert capsys.readouterr().out.count("Layer graphons") == 1


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"unknown order 'degre'\. Did you mean 'degree'"):
        GraphonMonitor(order="degre")
    with pytest.raises(ValueError, match="bins must be at least 1"):
        GraphonMonitor(bins=0)
    with pytest.raises(ValueError, match="every_n_steps"):
        GraphonMonitor(every_n_steps=0)


def read_csv(trainer):
    trainer.logger.save()
    with open(f"{trainer.log_dir}/metrics.csv") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("kwargs", [{"include": "nett"}, {"exclude": ["net.0", "nett"]}], ids=str)
def test_a_misspelt_layer_ends_the_fit_before_anything_is_trained(kwargs):
    trainer = make_trainer(monitor(raise_errors=False, **kwargs))
    with pytest.raises(ValueError, match=r"pattern 'nett' matches no prunable weight\. Did you mean 'net'\?"):
        trainer.fit(Classifier(), loader(), loader(32))
    assert trainer.global_step == 0
    assert not trainer.sanity_checking


def test_frozen_layers_may_be_named_before_they_thaw():
    class Thaw(Callback):
        def setup(self, trainer, pl_module, stage):
            pl_module.net[0].requires_grad_(False)

        def on_train_epoch_end(self, trainer, pl_module):
            pl_module.net[0].requires_grad_(True)

    watch = monitor(include="net.0", raise_errors=False, figure=False)
    fit(watch, Thaw())
    assert list(watch.graphons) == LAYERS[:1]


def test_layers_that_torch_prunes_may_be_named():
    model = Classifier()
    for layer in (model.net[0], model.net[2]):
        l1_unstructured(layer, "weight", amount=0.5)
    watch = monitor(include="net.0", figure=False)
    fit(watch, model=model)
    assert watch.graphons[LAYERS[0]].density == pytest.approx(0.5)


def test_a_failure_is_told_once(caplog, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("broken estimate")

    monkeypatch.setattr("lightning_graphon.callbacks.graphon_monitor.layer_graphons", broken)
    fit(monitor(raise_errors=False), max_epochs=3)
    (said,) = [record for record in caplog.records if record.name.startswith("lightning_graphon")]
    assert "broken estimate" in said.exc_text


class Exchange(Callback):
    """Masks that change at given steps, in place, as those of DynamicSparsity do."""

    def __init__(self, prune, steps):
        self.prune, self.steps = prune, steps

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step in self.steps:
            mask = self.prune.masks[LAYERS[0]]
            mask.copy_(mask.roll(trainer.global_step, 1))


def test_the_flow_of_a_moving_mask_is_that_of_the_library(tmp_path):
    prune = pruner("random", 0.8)
    watch = monitor(every_n_steps=1)
    trainer = fit(
        prune, Exchange(prune, (1, 3)), watch, max_epochs=2, logger=CSVLogger(tmp_path), default_root_dir=tmp_path
    )
    assert list(watch.flows) == LAYERS[:1], "the others have not moved"
    flow = watch.flows[LAYERS[0]]
    assert [point.step for point in flow.points] == [0, 1, 3]
    start = prune.masks[LAYERS[0]].roll(-4, 1)
    expected = LayerFlow(start)
    expected.look(start.roll(1, 1), 1)
    point = expected.look(start.roll(4, 1), 3)
    rows = [row for row in read_csv(trainer) if row.get(f"graphon/{LAYERS[0]}/moved_from_start")]
    keys = {
        "moved": point.moved_last, "moved_from_start": point.moved, "moved_by_chance": point.by_chance,
        "limit_distance": point.limit_distance, "churn": point.churn, "dead_units": 0, "revived_units": 0,
    }  # fmt: skip
    assert {key: float(rows[-1][f"graphon/{LAYERS[0]}/{key}"]) for key in keys} == pytest.approx(keys)
    assert len(list(tmp_path.rglob("graphon_flow/*.png"))) == 1


def test_of_masks_that_stay_no_flow_is_shown_or_stored(tmp_path):
    watch = monitor()
    trainer = fit(pruner(), watch, max_epochs=2, logger=CSVLogger(tmp_path), default_root_dir=tmp_path)
    assert not watch.flows
    assert not watch.state_dict()
    assert not any("moved" in key or "churn" in key for row in read_csv(trainer) for key in row)
    assert not list(tmp_path.rglob("graphon_flow/*"))


def test_where_there_is_no_time_left_for_the_figure_it_is_said(tmp_path, caplog, monkeypatch):
    class Late(Callback):
        """After the masks have moved the time is used up."""

        def on_train_end(self, trainer, pl_module):
            monkeypatch.setattr(TimeBudget, "floor", 1e-9)

    rigl = DynamicSparsity("rigl", sparsity=0.8, every_n_steps=1, verbose=False)
    watch = monitor(every_n_steps=1)
    fit(rigl, Late(), watch, max_epochs=2, logger=CSVLogger(tmp_path), default_root_dir=tmp_path)
    assert watch.flows
    assert not list(tmp_path.rglob("graphon_flow/*"))
    assert "no figure of the flow" in caplog.text


@pytest.mark.parametrize("saved_at", [2, 4, 5, 6, 10])
def test_a_resumed_run_follows_the_same_flow(saved_at, tmp_path):
    """Masks change after steps 2, 4, 6, ...; looks are at every third step and at the start of epochs of four."""

    def run(*callbacks, **kwargs):
        watch = monitor(every_n_steps=3, time_budget=math.inf, figure=False)
        sparse = DynamicSparsity("rigl", 0.8, every_n_steps=2, fraction=0.5, stop=20, verbose=False)
        trainer = make_trainer(
            sparse, watch, *callbacks, max_epochs=4, limit_train_batches=4, enable_checkpointing=True
        )
        trainer.fit(Classifier(), DataLoader([next(iter(loader()))] * 4, batch_size=None), **kwargs)
        return watch

    saved = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole = run(saved)
    checkpoint = tmp_path / f"step={saved_at}.ckpt"
    resumed = run(ModelCheckpoint(tmp_path / "again"), ckpt_path=checkpoint, **SAFELY)
    assert list(resumed.flows) == list(whole.flows) == LAYERS
    for name in LAYERS:
        assert len(whole.flows[name].points) > 4
        for a, b in zip(whole.flows[name].points, resumed.flows[name].points, strict=True):
            assert all(
                torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
                for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
            )


def test_a_flow_of_something_else_is_told_and_left(tmp_path, caplog):
    watch = monitor()
    watch.setup(make_trainer(), Classifier(), "fit")
    watch.load_state_dict({"layers": {"a": {"start": 1}}, "waiting": {}})
    assert "follows graphons from here on" in caplog.text
    assert not watch.flows


def test_the_limit_is_that_of_the_scores_of_the_start():
    """SNIP's masks are nearer to it than to the constant graphon."""
    arguments = {"every_n_steps": 1, "verbose": False, "stop": 100}
    known, unknown = (DynamicSparsity("set", 0.8, start="snip", report_limits=r, **arguments) for r in (True, False))
    found = []
    for sparse in (known, unknown):
        watch = monitor(every_n_steps=1)
        fit(sparse, watch)
        found.append(watch.flows[LAYERS[0]])
    for flow, name in zip(found, ("scores", "constant"), strict=True):
        mask = flow.start
        limit = known.start_limits[LAYERS[0]] if name == "scores" else constant(float(mask.double().mean()))
        expected = l2_distance(limit, estimate_graphon(mask, 16), align=False)
        assert flow.points[0].limit_distance == pytest.approx(expected, rel=1e-6)
    assert found[0].points[0].limit_distance < 0.5 * found[1].points[0].limit_distance
