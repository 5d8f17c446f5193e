"""What the monitors share."""
