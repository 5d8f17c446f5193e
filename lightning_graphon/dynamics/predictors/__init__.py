"""Loss curves ahead of training: copies of the network are trained on other data, as they are, linearised or redrawn."""
