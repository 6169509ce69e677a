"""Sweeps: many runs of one command, in a folder that knows how each of them went."""
