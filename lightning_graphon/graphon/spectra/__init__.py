"""Singular values of masked weights, beside what the graphon of a mask brings by itself."""
