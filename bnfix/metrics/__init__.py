"""Outputs turned into metrics, intervals and paired differences; the gate judges by them."""
