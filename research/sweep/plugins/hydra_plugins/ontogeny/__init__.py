"""Plugins of this project for Hydra. Hydra imports every module here in each app of the environment: none of them imports JAX."""
