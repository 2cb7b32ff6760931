"""
The process that all of this runs in: `ranks` of a launch, `random_state`, `threads`, `memory`, and `caches` on disk.
"""
