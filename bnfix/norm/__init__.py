"""The example-aware norm layer, the search for norm layers in models, and their swap."""
