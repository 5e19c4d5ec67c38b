"""What is minimised. An objective knows roles, not models: these come as arguments of `loss` (see `types.Objective`)."""
