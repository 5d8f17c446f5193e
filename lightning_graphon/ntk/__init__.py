"""Kernels: infinite width, finite width, spectra, dynamics. Needs torch and scipy only."""
