"""Starting a run on this machine and supervising its processes."""
