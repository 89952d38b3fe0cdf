"""The records of all stages as JSON, Markdown and a page."""
