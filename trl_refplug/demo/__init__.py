"""
A small, real DPO run that starts with nothing but this package: `trl-refplug demo`.

- `data`: the preference pairs that ship with the package
- `model`: SmolLM2-135M-Instruct, from the hub or from PyPI
- `run`: the training run itself
- `report`: table, picture and `results.json`
"""
