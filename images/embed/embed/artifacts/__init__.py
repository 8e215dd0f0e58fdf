"""What the job leaves behind: output files (`outputs`, `written`) and `results.json` (`results`)."""
