"""
A small LoRA-DPO job, trained once or with several reference providers.

`trl-refplug demo` trains it once. `trl-refplug compare` trains it once with each provider, and compares the runs.

- `pairs`: the preference pairs that ship with the package
- `demo_model`: SmolLM2-135M-Instruct, from the hub or from PyPI
- `provider_choice`: a provider and its options, as they are given on the command line
- `job`: what is trained, and the record of a run
- `training`: the trainer, and a run of the job in this process
- `child_process`: the same run in a process of its own
- `comparison`: how far runs agree and what they cost, as tables and as JSON
- `demo`: the demo's run, which also samples answers before and after, and its table
- `pictures`: the curves and the costs, drawn

The modules `provider_choice`, `job` and `child_process` do not import torch when they are imported.
"""
