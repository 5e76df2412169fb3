"""Training on labels: the baseline of few-label methods, and what their terms are added to."""
