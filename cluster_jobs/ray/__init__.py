"""A run on Ray: connection, placement, actors, controller."""
