"""
Times TRL's way to score rows against packed scoring: `trl-refplug bench score`.

- `workloads`: the rows to score
- `measure`: times both ways in turns
- `report`: the results as a table, as a plot and as JSON
"""
