"""Processes that have to agree, and weights that are cut over them."""
