"""The module that takes the place of TRL's reference model, and passes every batch to the provider."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.utils import FusedCausalLMOutput

from trl_refplug.errors import InvalidLogProbsError, UnsupportedInputError
from trl_refplug.plugins import plugin_manager
from trl_refplug.provider import ReferenceBatch, ReferenceProvider
from trl_refplug.rows.answers import form_problem
from trl_refplug.trainers.prefetch import Prefetcher
from trl_refplug.trainers.read_only import read_only, write_error
from trl_refplug.trainers.requested_batches import ROW_WISE
from trl_refplug.trainers.trl_patch import unsupported_trl


class ReferenceModel(nn.Module):
    """
    The module that is in `trainer.ref_model`. It has no parameters of its own. If the provider has a model in this
    process, it shows the parameters of that one, read-only.

    Args:
        provider ([`ReferenceProvider`]): The provider that answers.
        first_call (`Callable`): Called with the first batch and its log-probs, before they are used. If it raises, it
            is called with the next batch again, until it has returned once.
        prefetcher ([`Prefetcher`], *optional*): It may have asked the provider about the batch already.
        dtype (`torch.dtype`): The dtype of the policy's own log-probs, which the answers are cast to.
        device (`torch.device`, *optional*): The device of the policy's own log-probs, if it is not that of the inputs.

    Attributes:
        calls (`int`): How many times the trainer has asked.
        checked (`bool`): Whether `first_call` has returned. If it is set to `False`, `first_call` is called again.
        seconds (`float`): How long the trainer has waited for answers, in all.
    """

    provider: ReferenceProvider
    _first_call: Callable[[ReferenceBatch, Tensor], None]

    def __init__(
        self,
        provider: ReferenceProvider,
        first_call: Callable[[ReferenceBatch, Tensor], None],
        prefetcher: Prefetcher | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        # The provider is no nn.Module, so that the trainer does not find, move, save or train the model it has.
        self.provider = provider
        self._first_call = first_call
        self._prefetcher = prefetcher
        self._dtype = dtype
        self._device = device
        self.calls = 0
        self.checked = False
        self.seconds = 0.0

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        fused_lm_head: bool = False,
        use_cache: bool | None = None,
        **extras: Any,
    ) -> FusedCausalLMOutput:
        if input_ids is None or labels is None or not fused_lm_head:
            raise unsupported_trl("The trainer called its reference model without `labels=` and `fused_lm_head=True`")
        if "shift_labels" in extras:
            raise unsupported_trl("The trainer called its reference model with `shift_labels=` (context parallelism)")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        batch = ReferenceBatch(input_ids, attention_mask, labels, extras, rows_sliceable=ROW_WISE.issuperset(extras))
        provider = self.provider
        if not batch.rows_sliceable and not provider.capabilities.multimodal:
            raise UnsupportedInputError(
                f"Reference provider {provider.identity().provider!r} scores text only, and this batch has "
                f"{sorted(set(extras) - ROW_WISE)}. Use ref_provider='frozen' or 'adapter'."
            )
        if input_ids.is_cuda:
            # Finish the policy's forward pass, which may still run: the time for it is not the reference's.
            torch.cuda.current_stream(input_ids.device).synchronize()
        started = time.perf_counter()
        with torch.no_grad():
            coming = None if self._prefetcher is None else self._prefetcher.take(batch)
            log_probs = provider.log_probs(batch) if coming is None else coming.result()
            if problem := form_problem(log_probs, batch):  # the loss would use a wrong shape or dtype without an error
                raise InvalidLogProbsError(
                    f"Reference provider {provider.identity().provider!r}: {problem}. Nothing was trained on it."
                )
            log_probs = log_probs.detach()
        seconds = time.perf_counter() - started
        self.seconds += seconds
        self.calls += 1
        if not self.checked:
            self._first_call(batch, log_probs)
            self.checked = True  # not if it raised: whoever trains on in spite of that gets the error again
        plugin_manager().scored(identity=provider.identity(), batch=batch, log_probs=log_probs, seconds=seconds)
        return FusedCausalLMOutput(log_probs=log_probs.to(self._device, self._dtype))

    def get_parameter(self, target: str) -> nn.Parameter:
        module = self.provider.module
        if module is None:
            raise AttributeError(f"Reference provider {type(self.provider).__name__} has no in-process copy")
        return read_only(module.get_parameter(target))

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        module = self.provider.module
        if module is None:
            return iter(())
        return ((name, read_only(parameter)) for name, parameter in module.named_parameters(*args, **kwargs))

    def parameters(self, recurse: bool = True) -> Any:
        return (parameter for _, parameter in self.named_parameters(recurse=recurse))

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise write_error("load_state_dict()")

    def extra_repr(self) -> str:
        return str(self.provider.identity())
