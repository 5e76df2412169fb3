"""A gang on Ray: its processes (member), where they go (placement), one life of it (gang)."""
