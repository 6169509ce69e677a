"""Contracts, types, named keys, pytree paths, building from a config, files, errors: what every room may import."""
