"""Rehearsal of a training: a nested fit of a copy of the whole LightningModule, ahead of the training itself."""
