"""Rehearse spot interruptions and measure the work that they cost."""
