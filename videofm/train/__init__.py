"""Training: a config becomes models, objective, engine and loader (`build`), and a loop that knows none of them by name."""
