"""
What the `ema` provider is made of.

- `model_average`: an average of whole models
- `adapter_average`, `lora`, `low_rank`: an average of adapters, kept as a second adapter
- `shards`, `tensor_files`: parameters of which every rank holds a part, in memory and in checkpoints
- `export`: the average of a checkpoint as a model of its own
"""
