"""Graphons predicted from scores, before any mask is made."""
