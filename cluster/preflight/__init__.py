"""What preflight finds out on the nodes of a Ray cluster, each by a process of its own there."""
