"""The object: step graphons, named families, sampling."""
