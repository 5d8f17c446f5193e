"""`PruneAtInit(masks=...)`: masks that were found elsewhere."""

import pickle

import pytest
import torch

from lightning_graphon.callbacks import GraphonMonitor, PruneAtInit, SpectrumOptions
from lightning_graphon.pruning import Masks, prune
from tests.helpers.modules import Classifier, Probe, disagreement, loader, make_trainer, mlp, pruned_max, quiet


@pytest.fixture
def masks():
    return prune(Classifier(), "random", sparsity=0.8)


@pytest.fixture
def path(masks, tmp_path):
    masks.save(tmp_path / "masks.pt")
    return tmp_path / "masks.pt"


def given(masks, **kwargs):
    return PruneAtInit.from_masks(masks, verbose=False, **kwargs)


@pytest.mark.parametrize("form", ["Masks", "dict", "path", "text"])
def test_trains_with_them_and_scores_nothing(form, masks, path, monkeypatch):
    from lightning_graphon.callbacks._module import scoring as module

    monkeypatch.setattr(module, "compute_masks", lambda *a, **k: pytest.fail("something was scored"))
    pruner = given({"Masks": masks, "dict": dict(masks), "path": path, "text": str(path)}[form])
    probe, model = Probe(pruner), Classifier()
    watch = GraphonMonitor(figure=False, verbose=False, raise_errors=True, spectrum=SpectrumOptions(probe_size=8))
    make_trainer(pruner, probe, watch).fit(model, loader(), loader(32))
    assert disagreement(pruner.masks, masks) == 0.0
    assert probe.worst == {"step": 0.0, "validation": 0.0, "gradient": 0.0, "batch": 0.0}
    assert pruned_max(model, masks) == 0.0
    assert list(watch.graphons) == list(masks)


def test_another_model_is_pruned_with_the_same_masks(masks):
    pruner = given(masks)
    for seed in (1, 2):
        make_trainer(pruner).fit(model := Classifier(seed=seed), loader())
        assert pruned_max(model, masks) == 0.0


def test_travels(path, masks):
    pruner = pickle.loads(pickle.dumps(given(path)))
    make_trainer(pruner).fit(Classifier(), loader())
    assert pruner.masks == masks


def test_resumes_its_own_run_and_that_of_the_method_that_found_them(masks, tmp_path):
    for first in (given(masks), quiet("magnitude", min_density=0.05)):
        trainer = make_trainer(first)
        trainer.fit(Classifier(), loader())
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        again = given(first.masks)
        make_trainer(again, max_epochs=2).fit(Classifier(seed=5), loader(), ckpt_path=tmp_path / "a.ckpt")
        assert again.masks == first.masks
    with pytest.raises(
        ValueError, match=r"trained with other masks \(.*0\.8999.*than those given \(.*0\.8001.*same masks"
    ):
        make_trainer(given(masks), max_epochs=2).fit(Classifier(), loader(), ckpt_path=tmp_path / "a.ckpt")


def test_a_method_does_not_resume_a_run_of_given_masks(masks, tmp_path):
    trainer = make_trainer(given(masks))
    trainer.fit(Classifier(), loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"pruned with method='given masks' but.*method='snip'"):
        make_trainer(quiet("snip"), max_epochs=2).fit(Classifier(), loader(), ckpt_path=tmp_path / "a.ckpt")


def test_masks_of_another_model_are_an_error_on_fit(masks, capsys):
    other = Masks({name.removeprefix("net."): mask for name, mask in masks.items()})
    with pytest.raises(ValueError, match=r"no parameter '0\.weight'.*Did you mean 'net\.0\.weight'"):
        make_trainer(PruneAtInit.from_masks(other)).fit(Classifier(), loader())
    assert "kept" not in capsys.readouterr().out
    wide = Classifier(lambda: torch.nn.Sequential(torch.nn.Linear(64, 40), *mlp()[1:]))
    with pytest.raises(ValueError, match=r"'net\.0\.weight' has shape \(40, 64\).*shape \(32, 64\)"):
        make_trainer(given(masks)).fit(wide, loader())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {}}, r"no\.pt' is no file of masks.*masks\.save.*not a state of Masks"),
        ([1, 2], r"no file of masks.*got list"),
        ({"format": 1, "masks": {"net.0.weight": {"shape": [2, 2]}}}, "damaged"),
        (Classifier(), "no file of masks"),
        (b"something else", "no file of masks"),
        (b"", "no file of masks"),
        ({"format": 1, "masks": {}}, "no mask in it"),
    ],
)
def test_files_of_something_else(content, message, tmp_path):
    file = tmp_path / "no.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(ValueError, match=message):
        given(file)
    with pytest.raises(FileNotFoundError):
        given(tmp_path / "nothing.pt")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PruneAtInit(), "method"),
        (lambda: PruneAtInit("snip"), "a method and a sparsity"),
        (lambda: PruneAtInit(sparsity=0.9), "method"),
        (lambda: PruneAtInit.from_masks(3), "got 3"),
        (lambda: PruneAtInit.from_masks({"net.0.weight": torch.ones(2)}), "bool tensor"),
        (lambda: in_a_preset(sparsity=0.9), "leave out sparsity, or the masks"),
        (lambda: in_a_preset(include="net"), "leave out include, or the masks"),
        (lambda: in_a_preset(batches=[torch.ones(2)]), "leave out batches"),
    ],
)
def test_arguments(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def in_a_preset(**arguments):
    """As a preset names masks: by a method of that name."""
    return PruneAtInit("given", options={"masks": {"a": torch.ones(2) > 0}}, **arguments)


def test_masks_in_a_configuration(masks, tmp_path):
    masks.save(tmp_path / "masks.pt")
    named = PruneAtInit("given", options={"masks": str(tmp_path / "masks.pt")}, verbose=False)
    make_trainer(named).fit(Classifier(), loader())
    assert named.masks == masks


def test_prints_a_table(masks, capsys):
    make_trainer(PruneAtInit.from_masks(masks)).fit(Classifier(), loader())
    assert "PruneAtInit: the masks given" in capsys.readouterr().out
