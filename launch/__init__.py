"""Starting the ranks of a training run."""
