"""Faults injected into the ledger, and the tools that inject them."""
