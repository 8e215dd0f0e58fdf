"""Synthetic recordings in the study's format."""
