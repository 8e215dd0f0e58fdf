"""Kubernetes: an Indexed Job with a headless service, printed for `kubectl apply`."""
