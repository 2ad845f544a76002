"""Programs that use the pipeline; nothing but the command line knows them."""
