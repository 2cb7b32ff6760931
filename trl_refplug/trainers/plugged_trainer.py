"""`plug`: makes a subclass of one of TRL's trainers that takes its reference from a provider."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from functools import cache
from typing import Any, TypeVar

from transformers.trainer_utils import get_last_checkpoint

from trl_refplug.errors import ConfigurationError
from trl_refplug.models.adapters import REFERENCE_ADAPTER
from trl_refplug.provider import ReferenceProvider
from trl_refplug.trainers import policy as policies
from trl_refplug.trainers.callback import SessionCallback
from trl_refplug.trainers.checkpoint import write_to_checkpoint
from trl_refplug.trainers.online import AsksForWholeGenerations, AwaitsAnswers
from trl_refplug.trainers.open_session import open_session
from trl_refplug.trainers.session import ReferenceSession
from trl_refplug.trainers.trl_patch import PatchPoint, flags_masked, unsupported_trl


T = TypeVar("T")


def plug(trainer_class: type[T]) -> type[T]:
    """
    A subclass of `trainer_class` whose reference log-probs come from the provider that `ref_provider` selects.

    Works for TRL's `DPOTrainer`, `KTOTrainer`, `GRPOTrainer`, `RLOOTrainer` and for subclasses of them. The result
    takes two more keyword arguments: `reference=`, a provider instance, and, where TRL has none, `ref_model=`.

    Raises:
        SeamError: The trainer does not reach its reference as TRL's trainers do.

    Example:

    ```python
    from trl import DPOTrainer
    from trl_refplug import plug


    class MyTrainer(DPOTrainer): ...


    trainer = plug(MyTrainer)(model=model, args=args, train_dataset=dataset, processing_class=tokenizer)
    ```
    """
    if issubclass(trainer_class, Plugged):
        return trainer_class
    patch_point = PatchPoint.find_in(trainer_class)
    plugged = _plugged_owner(patch_point.owner)
    # `plugged` comes between the user's class and TRL's, so that the user's `__init__`, once it has called
    # `super().__init__()`, finds the reference in its place.
    bases = (plugged,) if trainer_class is patch_point.owner else (trainer_class, plugged)
    outermost = (_Outermost, AwaitsAnswers) if patch_point.online else (_Outermost,)
    return type(
        f"RefPlug{trainer_class.__name__}",
        (*outermost, *bases),
        {
            "__doc__": trainer_class.__doc__,
            "__module__": trainer_class.__module__,
            "__signature__": _signature(trainer_class, online=patch_point.online),
        },
    )


def _signature(trainer_class: type, *, online: bool) -> inspect.Signature:
    """
    The signature that `help()` and editors show: the trainer's own arguments and those that [`_Outermost`] takes.
    """
    own = inspect.signature(trainer_class)
    added = ["ref_model", "reference"] if online else ["reference"]
    kind = inspect.Parameter.KEYWORD_ONLY
    keywords = [inspect.Parameter(name, kind, default=None) for name in added if name not in own.parameters]
    parameters = list(own.parameters.values())
    at = len(parameters) - any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    return own.replace(parameters=[*parameters[:at], *keywords, *parameters[at:]])


class _Outermost:
    """
    The first class in the method resolution order. It takes the arguments `reference` and `ref_model`, which neither
    TRL's `__init__` nor that of the user's subclass knows.
    """

    def __init__(self, *args: Any, reference: ReferenceProvider | None = None, **kwargs: Any) -> None:
        self._refplug_reference = reference
        self._refplug_ref_model = None
        if type(self)._refplug_patch_point.online:  # type: ignore[attr-defined]
            self._refplug_ref_model = kwargs.pop("ref_model", None)
        super().__init__(*args, **kwargs)
        if not hasattr(self, "_refplug_session"):
            raise unsupported_trl(f"{type(self).__name__}.__init__ does not call `super().__init__()`")

    def get_batch_samples(self, epoch_iterator: Any, *args: Any, **kwargs: Any) -> Any:
        session = self._refplug_session  # type: ignore[attr-defined]
        if session is None or session.prefetcher is None:
            return super().get_batch_samples(epoch_iterator, *args, **kwargs)  # type: ignore[misc]
        with session.prefetcher.around(self, epoch_iterator) as batches:
            return super().get_batch_samples(batches, *args, **kwargs)  # type: ignore[misc]

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        session = self._refplug_session  # type: ignore[attr-defined]
        if session is not None and session.monitor is not None:
            session.monitor.look(self, inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]


class Plugged:
    """The mixin that comes right before the class of TRL that loads the reference."""

    _refplug_patch_point: PatchPoint
    _refplug_reference: ReferenceProvider | None
    _refplug_ref_model: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        patch_point = self._refplug_patch_point
        bound = patch_point.signature.bind(self, *args, **kwargs)
        given = bound.arguments
        model = given["model"]
        config = given["args"] = given.get("args") or patch_point.default_args(model)
        session = open_session(
            patch_point,
            model=model,
            args=config,
            peft_config=given.get("peft_config"),
            reference=self._refplug_reference,
            ref_model=given.get("ref_model", self._refplug_ref_model),
            processing_class=given.get("processing_class"),
            train_dataset=given.get("train_dataset"),
        )
        self._refplug_session: ReferenceSession | None = session
        if session is None:
            super().__init__(*bound.args[1:], **bound.kwargs)
            return
        if given.get("ref_model") is not None and not session.gives_trl_its_model:
            given["ref_model"] = None
        adapters_before = policies.adapter_names(model)
        if REFERENCE_ADAPTER in adapters_before:
            raise ConfigurationError(
                "The policy already has an adapter called 'ref', the name TRL gives to its own reference adapter. "
                "Load yours under another name (`model.load_adapter(path, adapter_name='reference')`)."
            )
        try:
            if not isinstance(model, str):
                session.pin(model)
            with flags_masked(config), policies.default_adapter_known(model), session.loading_replaced(self):
                super().__init__(*bound.args[1:], **bound.kwargs)
            reference_model = session.start(self, adapters_before)
            if session.asked_by_trainer:
                self.ref_model = reference_model
        except BaseException:  # also for Ctrl-C while a store is being filled
            session.close()
            raise
        self._refplug_callback = SessionCallback(session)
        self.add_callback(self._refplug_callback)  # type: ignore[attr-defined]
        self._refplug_saving = False

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)  # type: ignore[attr-defined]
        # If there is no checkpoint to resume from, TRL's `train` raises an error that says so.
        session = self._refplug_session
        with nullcontext() if session is None else session.training(str(checkpoint) if checkpoint else None):
            return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._refplug_session is not None and self.model.training:  # type: ignore[attr-defined]
            logs.update(self._refplug_callback.pop_averages())
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self._refplug_session is not None:
            self._refplug_session.checkpoint_begins(self.state.global_step)  # type: ignore[attr-defined]
        self._refplug_saving = True
        try:
            super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._refplug_saving = False

    def _load_best_model(self, *args: Any, **kwargs: Any) -> None:
        super()._load_best_model(*args, **kwargs)  # type: ignore[misc]
        if self._refplug_session is not None:
            self._refplug_session.rewound(self.state.best_model_checkpoint)  # type: ignore[attr-defined]

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        super().save_model(output_dir, *args, **kwargs)  # type: ignore[misc]
        # In a checkpoint the model is saved first. `trainer_state.json` is saved last, and makes the checkpoint
        # complete.
        if self._refplug_session is not None and self._refplug_saving and output_dir is not None:
            session = self._refplug_session
            main_process = self.args.should_save  # type: ignore[attr-defined]
            probe = session.check.record(session.providers)
            write_to_checkpoint(output_dir, session.provider, session.name, probe, main_process=main_process)


@cache
def _plugged_owner(owner: type) -> type:
    patch_point = PatchPoint.find_in(owner)
    bases = (Plugged, AsksForWholeGenerations, owner) if patch_point.online else (Plugged, owner)
    return type(f"Plugged{owner.__name__}", bases, {"_refplug_patch_point": patch_point})
