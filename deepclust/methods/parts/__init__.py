"""What methods are composed of: heads and the like."""
