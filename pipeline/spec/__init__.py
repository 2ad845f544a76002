"""The job file: its keys, the rules between them, and everything that reads or describes them."""
