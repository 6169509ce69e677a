"""Data: what a config opens, how it is split and standardised, and how batches are drawn from it."""
