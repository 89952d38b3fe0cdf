"""One file per command: it opens the session, runs the steps and writes the report."""
