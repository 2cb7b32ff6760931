"""
The process that everything runs in, and its machine.

- `ranks`: the ranks of a launch
- `random_state`: the random state, which scoring leaves as it was
- `threads`: scoring on a thread of its own
- `memory`: peak memory
- `files`: writing files atomically
- `caches`: the directory for what later runs can use again
"""
