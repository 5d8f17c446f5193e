"""Generalisation bounds and predictions of a kernel, and graphons designed for their kernel."""
