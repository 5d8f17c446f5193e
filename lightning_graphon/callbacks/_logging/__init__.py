"""Numbers and pictures for whatever loggers there are."""
