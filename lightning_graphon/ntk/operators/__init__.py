"""Kernels as matrices, Kronecker products and operators, and their spectra."""
