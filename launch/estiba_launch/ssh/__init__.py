"""The ssh target: any box with a shell, through the system's own ssh and rsync; Docker is brought if it is missing."""
