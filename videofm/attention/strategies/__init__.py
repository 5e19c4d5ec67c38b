"""How attention runs over several processes; one file a strategy, each wraps a backend."""
