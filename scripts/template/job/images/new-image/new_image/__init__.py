"""Text files to word counts. Read config, data, job, artifacts, in this order."""
