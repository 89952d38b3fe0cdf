"""Faults of norm layers, and a file's record of its own history."""
