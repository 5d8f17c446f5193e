"""The command `lightning-graphon`: train with LightningCLI, write reports, find presets, make networks small."""

import argparse
import importlib
import inspect
import sys
import warnings
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from lightning_graphon.presets import preset_path, presets

_FIT_HELP = """usage: lightning-graphon fit [--preset NAME ...] --config FILE [--model CLASS] [...]

Trains any LightningModule that your configuration names. Everything but --preset is LightningCLI's own:
lightning-graphon fit --help shows it.

  --preset NAME   a preset of this library, one of: {presets}
                  (several add up; the same as --config with the path that `lightning-graphon presets NAME` prints,
                  after all other configurations, so that their `callbacks:` do not replace it)
"""
_NO_MODEL = (
    "no model given. Name your LightningModule, on the command line (--model my_module.MyModel) or in a "
    "configuration file:\n  model:\n    class_path: my_module.MyModel"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the name of the program; None: those of the process.

    Returns:
        The exit status, 0.

    Raises:
        SystemExit: Wrong arguments, or a run that is not there, with status 2 and one sentence on standard error.

    >>> status = main(["presets"])  # doctest: +ELLIPSIS
    force       FORCE: ...
    >>> status
    0
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["fit"]:  # its other arguments are LightningCLI's
        return _fit(arguments[1:])
    parser = _parser()
    parsed = parser.parse_args(arguments)
    try:
        if parsed.command == "compact":
            return _compact(parsed.checkpoint, parsed.module, parsed.output)
        return _report(parsed.run_dir, parsed.output) if parsed.command == "report" else _presets(parsed.name)
    except (OSError, ValueError) as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "lightning-graphon", description="Train sparse networks, make them small, write a report of runs, find presets."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("fit", help="train with LightningCLI and presets of this library")
    report = commands.add_parser("report", help="write one HTML page about finished runs")
    report.add_argument("run_dir", type=Path, help="log directory of a run, or a folder with several")
    report.add_argument("--output", type=Path, metavar="FILE", help="default: report.html in RUN_DIR")
    names = commands.add_parser("presets", help="list the presets, or print the path of one")
    names.add_argument("name", nargs="?", help="print the path of this preset")
    small = commands.add_parser("compact", help="remove what masks left without effect from a trained network")
    small.add_argument("checkpoint", type=Path, metavar="CKPT", help="checkpoint of a sparse network")
    small.add_argument("--module", required=True, metavar="CLASS", help="its LightningModule, as my_module.MyModel")
    small.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE",
        help=".pt2: a program of torch.export, which needs no class; .onnx; else the module itself by torch.save",
    )  # fmt: skip
    return parser


def _report(run_dir: Path, output: Path | None) -> int:
    from lightning_graphon.report.report import write_report

    print(f"Report: {write_report(run_dir, output)}")
    return 0


def _compact(checkpoint: Path, module: str, output: Path) -> int:
    from lightning_graphon._shared.model_io import guess_inputs
    from lightning_graphon.compact import compact

    kind = _module_class(module)
    if not checkpoint.is_file():
        raise FileNotFoundError(f"no checkpoint {str(checkpoint)!r}")
    model = kind.load_from_checkpoint(checkpoint, map_location="cpu").eval()
    inputs = guess_inputs(model)
    small = compact(model, None, inputs)  # pruned weights are zero in a checkpoint
    _save(small.model, inputs, output)
    print(f"{small.report}\nlargest difference of outputs: {small.report.error:.1e}\nSmall network: {output}")
    return 0


def _module_class(name: str) -> Any:
    sys.path.insert(0, str(Path.cwd()))
    path, _, kind = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(path), kind)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--module {name!r} cannot be imported: {error}") from error
    if not hasattr(found, "load_from_checkpoint"):
        raise ValueError(f"--module {name!r} is no LightningModule")
    return found


def _save(model: Any, inputs: Any, output: Path) -> None:
    """By the file's ending."""
    import torch

    from lightning_graphon._shared.objects.trees import tree_map

    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    args = args if isinstance(args, tuple) else (args,)
    if output.suffix == ".pt2":
        args, kwargs = tree_map(_two_samples, (args, kwargs))
        shapes = tree_map(lambda x: {0: torch.export.Dim.AUTO} if isinstance(x, torch.Tensor) else None, (args, kwargs))
        named = dict(zip(inspect.signature(model.forward).parameters, shapes[0], strict=False)) | shapes[1]
        torch.export.save(torch.export.export(model, args, kwargs, dynamic_shapes=named), output)
    elif output.suffix == ".onnx":
        torch.onnx.export(model, args, str(output), kwargs=kwargs)
    else:
        torch.save(model, output)


def _two_samples(x: Any) -> Any:
    """A program of one sample would take no more."""
    return x.repeat(2, *[1] * (x.ndim - 1)) if getattr(x, "ndim", 0) and len(x) == 1 else x


def _presets(name: str | None) -> int:
    if name is not None:
        print(preset_path(name))
        return 0
    width = max(map(len, presets()))
    for preset in presets():
        print(f"{preset:{width}}  {preset_path(preset).read_text(encoding='utf-8').splitlines()[0].removeprefix('# ')}")
    return 0


def _fit(arguments: list[str]) -> int:
    if not arguments:
        print(_FIT_HELP.format(presets=", ".join(presets())))
        return 0
    try:
        from jsonargparse import ArgumentError
        from lightning.pytorch.cli import LightningCLI
    except ImportError as error:
        raise SystemExit(
            f"lightning-graphon fit needs LightningCLI: pip install 'lightning-graphon[cli]' ({error})"
        ) from None
    # A module of the current folder can be named, as with `python main.py`.
    sys.path.insert(0, str(Path.cwd()))
    warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended")  # they are those of sys.argv
    kwargs = {"prog": "lightning-graphon", "exit_on_error": False}
    try:
        made = LightningCLI(args=["fit", *_with_presets(arguments)], parser_kwargs=kwargs)
    except ArgumentError as error:
        _fail(_NO_MODEL if "fit.model" in str(error) else str(error))
    if made.trainer.log_dir and made.trainer.is_global_zero:
        print(f"What it found, in one page: lightning-graphon report {made.trainer.log_dir}")
    return 0


def _fail(message: str) -> NoReturn:
    print(f"lightning-graphon fit: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _with_presets(arguments: Sequence[str]) -> list[str]:
    """`--preset NAME` as `--config PATH`, after all configurations: a later `callbacks:` would replace the preset's.

    >>> _with_presets(["--preset=snip", "--config", "mine.yaml"])[:2]
    ['--config', 'mine.yaml']
    """
    before: list[str] = []
    configs: list[str] = []
    after: list[str] = []  # from the first preset on
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name == "--preset":
            after += ["--config", _preset(value or next(rest, ""))]
        elif name in ("--config", "-c") and after:
            configs += [argument, *islice(rest, 0 if equals else 1)]
        else:
            (after or before).append(argument)
    return before + configs + after


def _preset(name: str) -> str:
    try:
        return str(preset_path(name))
    except ValueError as error:
        _fail(str(error))


if __name__ == "__main__":
    raise SystemExit(main())
