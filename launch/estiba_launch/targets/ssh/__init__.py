"""The ssh target: any host with a shell, through the system's own ssh and rsync."""
