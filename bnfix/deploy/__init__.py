"""Models that run elsewhere, each checked against the one that it came from."""
