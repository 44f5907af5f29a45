"""Folders and addresses that hold what must last: whole or not at all, and written by one process at a time."""
