"""Kernels of infinitely wide networks whose masks follow graphons."""
