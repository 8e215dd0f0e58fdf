"""Rehearsing interruptions on the local host, and the accounting of what they cost."""
