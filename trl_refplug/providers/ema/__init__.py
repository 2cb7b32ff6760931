"""
The `ema` provider: a reference that follows the policy.

- `provider`: the provider, which decides when the reference moves
- `protocols`: what the provider asks of whatever moves
- `whole_model`: what whole models that follow the policy have in common; `model_average` and `bias_corrected` are the
  two ways in which they move
- `adapter_average`, `lora`, `low_rank`: an average of adapters, which is a second adapter of the policy
- `tensor_files`: the reference in checkpoints, where every rank may write a part of it
- `export`: writes the reference of a checkpoint as a model of its own
"""
