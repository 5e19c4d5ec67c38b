"""The kinds of stages: each module has `run(config, run) -> results`."""
