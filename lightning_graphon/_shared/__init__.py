"""What every package may use and no user needs."""
