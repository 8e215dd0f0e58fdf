"""Trials from where they lie to batches: the plan, requests, caches, checks."""
