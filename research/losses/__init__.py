"""Losses per element, without reduction."""
