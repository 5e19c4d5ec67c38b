"""One file a backend; each holds a `BACKEND` with `name`, `supports(spec)` and `__call__(q, k, v, mask)`."""
