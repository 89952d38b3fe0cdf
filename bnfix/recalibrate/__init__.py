"""Measurement of population statistics, with fixed weights."""
