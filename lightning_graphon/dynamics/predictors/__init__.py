"""Loss curves ahead of training: copies of the network are trained on other data, as they are or changed."""
