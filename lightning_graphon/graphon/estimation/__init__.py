"""From masks to step graphons."""
