"""
A small, real DPO run that starts with nothing but this package: `trl-refplug demo`.

- `data`: the preference pairs that ship with the package
- `model`: SmolLM2-135M-Instruct, from the hub or from PyPI
- `job`: the training job, which `trl-refplug compare` runs too
- `run`: the run of it, with answers before and after
- `report`: table, picture and `results.json`
"""
