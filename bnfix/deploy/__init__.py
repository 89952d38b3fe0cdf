"""Models for use elsewhere, each checked against its original."""
