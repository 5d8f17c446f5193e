"""Faults of one line that the tests must find: `python tests/mutations.py` makes each in a copy and runs its test."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PASSED, FAILED = 0, 1  # exit codes of pytest; others mean that no test was run


class Mutation(NamedTuple):
    """A line of the package, the fault in its place, and the test that must fail then."""

    file: str
    line: str
    fault: str
    test: str


MUTATIONS = (
    Mutation(
        "dynamics/optimizer.py",
        "torch.where(square > 0,",
        "torch.where(square >= 0,",
        "dynamics/test_optimizer.py::test_entries_without_a_gradient_do_not_move",
    ),
    Mutation(
        "dynamics/probed_network.py",
        "dtype or (torch.float64 if torch.float64 in dtypes else torch.float32)",
        "dtype or torch.float64",
        "dynamics/test_probed_network.py::test_kernels_are_computed_in_the_networks_own_precision",
    ),
    Mutation(
        "ntk/infinite/chain.py",
        '"ratio": 0.0}',
        '"ratio": built.ratio}',
        "ntk/infinite/test_from_model.py::test_the_kernel_is_the_sum_of_its_layers",
    ),
    Mutation(
        "ntk/empirical/gradient_factors.py",
        "self.row_factors.shape[3] == 1",
        "self.row_factors.shape[3] == 2",
        "ntk/empirical/test_layer_gram.py::test_two_groups_at_one_position",
    ),
    Mutation(
        "ntk/activations/base.py",
        "if degree < 1:",
        "if degree <= 1:",
        "ntk/activations/test_activations.py::test_a_series_of_one_term_is_the_mean",
    ),
    Mutation(
        "pruning/scoring/graphon.py",
        'generator(context.seed, "graphon masks")',
        "torch.Generator().manual_seed(context.seed)",
        "pruning/scoring/test_graphon.py::test_masks_do_not_depend_on_weights_of_the_same_seed",
    ),
    Mutation(
        "pruning/scoring/graphon.py",
        "dtype=torch.float64) + 0.5) / side",
        "dtype=torch.float64)) / side",
        "pruning/scoring/test_graphon.py::test_units_are_at_the_middle_of_their_intervals",
    ),
    Mutation(
        "graphon/core/step_graphon.py",
        "t.dtype == others[n].dtype and ",
        "",
        "graphon/core/test_step_graphon.py::test_graphons_of_different_dtype_are_not_equal",
    ),
    Mutation(
        "graphon/motifs/motifs.py",
        "max(cherry / edge**2 - 1, 0.0)",
        "abs(cherry / edge**2 - 1)",
        "graphon/motifs/test_motifs.py::test_degrees_that_vary_less_than_chance_do_not_vary",
    ),
    Mutation(
        "graphon/motifs/homogeneity.py",
        "0 < alpha < 1 ",
        "0 < alpha < 2 ",
        "graphon/motifs/test_homogeneity.py::test_refuses",
    ),
    Mutation(
        "pruning/masks.py",
        "whole = state.get(",
        "whole = True or state.get(",
        "pruning/test_mask_files.py::test_a_damaged_state_is_refused_and_changes_nothing",
    ),
    Mutation(
        "pruning/packing.py",
        "if claimed > there:",
        "if claimed < there:",
        "pruning/test_mask_files.py::test_no_more_memory_than_the_file_has",
    ),
    Mutation(
        "dynamics/compact_kernels.py",
        "square.tril(-1).mT",
        "square.tril(0).mT",
        "dynamics/test_compact_kernels.py::test_what_is_mirrored",
    ),
)


def copy_project(folder: Path) -> None:
    """The package, its tests and their settings."""
    leave = shutil.ignore_patterns("__pycache__")
    for name in ("lightning_graphon", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=leave)
    shutil.copy(ROOT / "pyproject.toml", folder)


def run(folder: Path, *tests: str) -> tuple[int, str]:
    """Exit code and output of pytest in a copy of the project."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore"]
    command += [f"tests/{test}" for test in tests]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def check(mutation: Mutation) -> str:
    """What is wrong with a mutation: nothing, if its test fails with it."""
    with tempfile.TemporaryDirectory() as name:
        copy_project(Path(name))
        path = Path(name, "lightning_graphon", mutation.file)
        text = path.read_text(encoding="utf-8")
        if text.count(mutation.line) != 1:
            return f"{mutation.line!r} is {text.count(mutation.line)} times in {mutation.file}"
        path.write_text(text.replace(mutation.line, mutation.fault), encoding="utf-8")
        code, output = run(Path(name), mutation.test)
        return "" if code == FAILED else f"pytest ended with {code}, not with a failed test:\n{output[-2000:]}"


def main() -> int:
    """Run all tests without a fault, then each with its own."""
    with tempfile.TemporaryDirectory() as name:
        copy_project(Path(name))
        code, output = run(Path(name), *(mutation.test for mutation in MUTATIONS))
        if code != PASSED:
            print(f"the tests fail without any fault:\n{output[-4000:]}")
            return 1
    wrong = {mutation: message for mutation in MUTATIONS if (message := check(mutation))}
    for mutation, message in wrong.items():
        print(f"{mutation.file}: {mutation.line!r} -> {mutation.fault!r} lives. {message}")
    print(f"{len(MUTATIONS) - len(wrong)} of {len(MUTATIONS)} faults are found")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
