"""Helpers of all packages, not for users."""
