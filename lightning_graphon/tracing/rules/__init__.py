"""What torch's functions do to units and positions, one file for each kind of function."""

from lightning_graphon.tracing.rules import affine, attention, elementwise, embeddings, movement, norms, scores, spatial


def install() -> None:
    """Importing the files registers their rules."""
    _ = affine, attention, elementwise, embeddings, movement, norms, scores, spatial
