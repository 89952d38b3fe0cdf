"""One file a command: opens the session, runs the steps, writes the report."""
