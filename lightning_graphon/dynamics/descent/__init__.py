"""Gradient descent in function space, with the kernel frozen: step by step, and in closed form."""
