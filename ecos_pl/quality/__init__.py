"""How good a proxy set is: metrics with `update` and `compute`, one idea a file."""
