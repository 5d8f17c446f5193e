"""Densities of small subgraphs, and a test whether a mask differs from a random one."""
