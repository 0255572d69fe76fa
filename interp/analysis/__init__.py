"""Analysis passes: each attaches hooks, runs the model, detaches, and hands a table back."""
