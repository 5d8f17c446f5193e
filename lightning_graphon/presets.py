"""Where the ready-to-use LightningCLI presets are, in an installed package and in a checkout."""

from importlib.resources import files
from pathlib import Path

from lightning_graphon._shared.checks import check_choice


def preset_path(name: str) -> Path:
    """Path of a YAML preset, for `--config` of a LightningCLI.

    Args:
        name: Name of a preset, such as "snip"; see `presets`.

    Raises:
        ValueError: There is no such preset.

    >>> preset_path("snip").name
    'snip.yaml'
    """
    check_choice("preset", name, presets())
    return _folder() / f"{name}.yaml"


def presets() -> list[str]:
    """Names of all presets.

    >>> "synflow" in presets()
    True
    """
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def _folder() -> Path:
    """`lightning_graphon/_presets` in a wheel; the top-level `callbacks/` in a checkout or an editable install."""
    package = Path(str(files("lightning_graphon")))
    installed = package / "_presets"
    return installed if installed.is_dir() else package.parent / "callbacks"
