"""Every byte that a run writes."""
