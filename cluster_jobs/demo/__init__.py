"""The demo: Fashion-MNIST from images to a report."""
