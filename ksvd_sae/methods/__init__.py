"""Kinds of dictionaries, a room each."""
