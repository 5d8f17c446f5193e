"""Faults that lived once do not live any more."""

import pytest

from tests import mutations


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda m: f"{m.file}: {m.fault or 'nothing'}")
def test_the_fault_is_found(mutation):
    assert not mutations.check(mutation)


def test_every_line_is_there_once():
    for mutation in mutations.MUTATIONS:
        text = (mutations.ROOT / "lightning_graphon" / mutation.file).read_text(encoding="utf-8")
        assert text.count(mutation.line) == 1, mutation
        assert (mutations.ROOT / "tests" / mutation.test.partition("::")[0]).is_file()
