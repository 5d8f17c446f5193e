"""Predictors of the loss of training, ahead of it, one interface each."""
