"""Training: the step, the loop around it, its state on disk, and what is logged."""
