"""What a model is, from its configuration and file headers alone."""
