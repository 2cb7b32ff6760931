"""
The same training job under several reference providers: `trl-refplug compare`.

- `contenders`: a provider and its options, as given on the command line
- `run`: the job under one of them, and what it leaves behind
- `apart`: that run in a process of its own
- `report`: agreement and costs, as tables and JSON
- `pictures`: the same, drawn
"""
