"""Input files to prompts."""
