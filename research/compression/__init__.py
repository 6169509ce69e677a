"""Smaller and cheaper models: methods that make a run out of a run, and the ledger of what they cost and gained."""
