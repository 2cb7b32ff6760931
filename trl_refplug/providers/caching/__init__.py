"""
What the `cached` provider is made of.

- `row_keys`: the rows of a batch and their keys in the store
- `borrowed`, `named_model`: who scores what is missing
- `filling`: scoring the missing rows of data sets ahead of training, and re-scoring a sample
- `batch_scorer`, `sharing`: whole batches on all ranks in step; work shared with other processes
"""
