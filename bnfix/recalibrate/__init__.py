"""Population statistics, measured."""
