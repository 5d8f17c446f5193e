"""All that was said of a training before it: at which steps, where the band is, through a checkpoint and back."""

import io

import pytest
import torch

from lightning_graphon.dynamics import PredictedLoss, PredictionsAhead

STEPS = torch.tensor([0, 1, 4])


def made():
    ahead = PredictionsAhead(
        {
            "rehearsal": PredictedLoss("rehearsal", STEPS, torch.tensor([[2.0, 1.0, 0.5], [2.0, 1.2, 0.7]])),
            "replay": PredictedLoss("replay", STEPS[:2], torch.tensor([[2.0, 1.1]]), 1.7),
        },
        {"sibling": "there is no chain"},
        rates=[[0.1, 0.2]] * 4,
        seconds=1.5,
    )
    ahead.find_lazy_until(0.1)
    return ahead


def test_a_step_is_predicted_or_not():
    ahead = made()
    assert ahead.steps == [0, 1, 4]
    assert ahead.until == 4
    assert ahead.at(1) == pytest.approx({"rehearsal": 1.1, "replay": 1.1})
    assert ahead.at(4) == pytest.approx({"rehearsal": 0.6})
    assert ahead.at(2) == {}
    assert ahead.band(4, 0.1) == pytest.approx((0.45, 0.77))
    assert ahead.band(3, 0.1) is None
    assert PredictionsAhead().band(0, 0.1) is None
    assert (PredictionsAhead().until, PredictionsAhead().steps) == (-1, [])


def test_theory_leaves_the_band_of_the_rehearsals():
    ahead = made()
    assert ahead.theory is ahead.predictions["replay"]
    assert ahead.lazy_until is None
    ahead.predictions["replay"] = PredictedLoss("replay", STEPS, torch.tensor([[2.0, 1.4, 0.6]]))
    ahead.find_lazy_until(0.1)
    assert ahead.lazy_until == 1


def test_through_a_checkpoint_and_back():
    ahead, file = made(), io.BytesIO()
    ahead.lazy_until = 4
    torch.save(ahead.state_dict(), file)
    file.seek(0)
    again = PredictionsAhead.from_state(torch.load(file, weights_only=True))
    for name, made_before in ahead.predictions.items():
        found = again.predictions[name]
        assert (found.name, found.cost) == (name, made_before.cost)
        assert torch.equal(found.steps, made_before.steps)
        assert torch.equal(found.losses, made_before.losses)
    assert list(again.predictions) == list(ahead.predictions)
    for name in ("refused", "rates", "seconds", "lazy_until"):
        assert getattr(again, name) == getattr(ahead, name), name
