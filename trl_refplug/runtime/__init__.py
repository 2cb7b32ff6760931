"""
The process that all of this runs in: `ranks` of a launch, `random_state`, `threads`, `memory`, and `caches` on disk;
`names` of models and data sets, and files that are written `aside`.
"""
