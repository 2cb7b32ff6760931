"""
TRL's way to score rows against the packed one: `trl-refplug bench score`.

- `workloads`: the rows to score
- `measure`: both ways, in turns
- `runs`: finished runs in a file, to go on from
- `report`: the results as a table and as a plot
"""
