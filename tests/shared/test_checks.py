"""Messages that help: what was given, what is allowed, what was meant."""

import pytest

from lightning_graphon._shared.checks import check_choice, check_sparsity, nearest


def test_the_nearest_word_whatever_its_case():
    assert nearest("SNIPP", ["magnitude", "snip"]).startswith("Did you mean 'snip'? Allowed: 'magnitude', 'snip'.")
    assert nearest("qqq", ["magnitude", "snip"]) == "Allowed: 'magnitude', 'snip'."


def test_words_that_are_suggested_but_not_listed():
    assert nearest("Conv2", ["0.weight"], ["Conv2d"]) == "Did you mean 'Conv2d'? Allowed: '0.weight'."


def test_long_lists_are_cut():
    message = nearest("layer7", [f"layer{i}" for i in range(25)])
    assert message.startswith("Did you mean 'layer7'?")
    assert message.endswith("'layer19' and 5 more.")


@pytest.mark.parametrize("value", ["grid ", "rid", None, 3])
def test_a_choice_that_is_none(value):
    with pytest.raises(ValueError, match=r"unknown points .*Allowed: 'grid', 'random'\."):
        check_choice("points", value, ("grid", "random"))


@pytest.mark.parametrize("value", [0, 0.5, 0.999])
def test_sparsities(value):
    assert check_sparsity(value) == value


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (1, ValueError, r"must lie in \[0, 1\), got 1$"),
        (90, ValueError, "for 90 % write 0.9"),
        (-0.1, ValueError, "got -0.1"),
        (float("nan"), ValueError, "got nan"),
        (True, TypeError, "of type bool"),
        ("0.9", TypeError, "of type str"),
    ],
)
def test_no_sparsities(value, error, message):
    with pytest.raises(error, match=message):
        check_sparsity(value)
