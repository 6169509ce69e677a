"""A model and its loss as one object."""
