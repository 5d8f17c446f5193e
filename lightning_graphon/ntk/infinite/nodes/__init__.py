"""Kernels of the kinds of steps a network consists of, one file for each."""
