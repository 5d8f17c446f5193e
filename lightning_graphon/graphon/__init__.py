"""Masks to step graphons: estimation, distances, motifs. Needs torch and scipy only."""
