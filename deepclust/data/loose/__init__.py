"""Image files that are read where they lie, under the ids that `deepclust pack` would give them."""
