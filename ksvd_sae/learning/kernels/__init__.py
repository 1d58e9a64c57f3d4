"""Compiled inner loops, one family a file; each is chosen by device and has a torch twin in sparse_coding.py."""
