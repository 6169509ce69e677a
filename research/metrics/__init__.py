"""Metrics: (sum, weight) on the device, and host metrics on stored predictions."""
