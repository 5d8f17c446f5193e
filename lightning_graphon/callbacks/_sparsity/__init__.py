"""What callbacks that keep a network sparse have in common."""
