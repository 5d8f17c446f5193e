"""Reading a LightningModule: its batches, its training_step, the network inside it."""
