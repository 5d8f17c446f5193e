"""Dual activations: E[φφ′] and E[φ̇φ̇′] under a Gaussian."""
