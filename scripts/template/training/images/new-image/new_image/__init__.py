"""Text files to a small language model. Read config, data, model, task, train, artifacts, in this order."""
