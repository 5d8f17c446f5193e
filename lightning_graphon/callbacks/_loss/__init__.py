"""Predicted and observed loss of one fit."""
