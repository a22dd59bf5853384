"""Thin adapters between the method and training libraries."""
