"""
The process that all of this runs in.

- `ranks`: agree with the other ranks on a value
- `random_state`: read the state of the random number generators, and keep it from changing
- `threads`: score on a separate thread with the caller's autocast state
- `memory`: measure the memory in use, and recognize that memory ran out
- `files`: write files atomically, and directories so that a failure leaves no half of one
- `names`: tell whether the name of a model or of a data set leads anywhere
- `caches`: the directory in which files are kept for later runs

Import from these modules: some of them need torch, and importing one of the others must not load it.
"""
