"""Outputs to metrics, intervals, paired differences, and the gate that decides by them."""
