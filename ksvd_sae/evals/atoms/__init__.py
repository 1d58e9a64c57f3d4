"""Atoms in context."""
