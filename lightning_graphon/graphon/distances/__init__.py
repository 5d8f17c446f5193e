"""Distances between graphons."""
