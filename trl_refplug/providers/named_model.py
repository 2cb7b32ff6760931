"""The model that the options of `frozen` name: how it is loaded, and what is known of it without loading it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import nn
from transformers import BitsAndBytesConfig

from trl_refplug.errors import ReferenceMismatchError
from trl_refplug.models.adapters import active_adapter
from trl_refplug.models.copies import freeze
from trl_refplug.models.files import delete_facts, fingerprint_files, load_facts, save_facts
from trl_refplug.models.identity import digest_model
from trl_refplug.models.pretrained import load_pretrained
from trl_refplug.provider import ModelTraits, ReferenceIdentity
from trl_refplug.providers.options import FrozenOptions
from trl_refplug.runtime.random_state import rng_kept
from trl_refplug.runtime.ranks import all_ranks


class NamedModel:
    """
    The model that the options of `frozen` name.

    Its log-probs in a store are found by its identity and traits. These are remembered when the model's files are
    loaded for the first time. As long as the files do not change, later runs need not load the model to know them.

    Args:
        options ([`FrozenOptions`]): The options of `frozen`, with `model` set.
        policy (`nn.Module`): The policy. Its dtype and attention implementation are the defaults for the model.
        args: The trainer's arguments.
    """

    def __init__(self, options: FrozenOptions, policy: nn.Module, args: Any) -> None:
        assert options.model is not None
        self.name = options.model
        self._revision = options.revision
        self._loading = loading(options, policy, args)
        self._files = self._fingerprint()
        # Under ZeRO-1 and ZeRO-2 all ranks have to place a model together. So it cannot be loaded late, when maybe
        # only one rank has rows to score.
        engine = args.deepspeed_plugin
        self._may_wait = engine is None or engine.zero_stage == 3

    def remembered(self) -> tuple[ReferenceIdentity, ModelTraits] | None:
        """
        The identity and traits of the model, if every rank knows them without loading it; otherwise `None`, on all
        ranks.
        """
        facts = load_facts(self._files) if self._may_wait else None
        if not all_ranks(facts is not None):  # TRL places a model on all ranks together
            return None
        assert facts is not None
        return ReferenceIdentity.from_dict(facts["identity"]), ModelTraits(**facts["model"])

    def remember(self, identity: ReferenceIdentity, traits: ModelTraits) -> None:
        """Remember the identity and traits of the model, unless its files were changed while it was loaded."""
        if self._fingerprint() == self._files:
            save_facts(self._files, {"identity": identity.to_dict(), "model": asdict(traits)})

    def load(self) -> nn.Module:
        """The model, frozen."""
        return freeze(load_pretrained(self.name, self._loading))

    def load_as(self, identity: ReferenceIdentity) -> nn.Module:
        """
        Load the model, and check that it is still the one that was remembered.

        Raises:
            ReferenceMismatchError: The content of its files has changed.
        """
        with rng_kept():
            module = self.load()
            digest = digest_model(module, adapter=active_adapter(module))
        if digest != identity.digest:
            delete_facts(self._files)
            raise ReferenceMismatchError(
                f"The files of {self.name!r} have the names, sizes and times they had when they were digested, and "
                f"another content: found digest {digest}, expected {identity.digest}. Nothing was scored, and what "
                "was remembered of them is forgotten: run again."
            )
        return module

    def _fingerprint(self) -> str | None:
        decides = {**self._loading, "dtype": str(self._loading["dtype"])}
        if decides["trust_remote_code"] or {"quantization_config", "subfolder"} & decides.keys():
            return None
        return fingerprint_files(self.name, self._revision, decides)


def loading(options: FrozenOptions, policy: Any, args: Any) -> dict[str, Any]:
    """The keyword arguments of `from_pretrained` with which the model that `options` name is loaded."""
    kwargs = dict(args.model_init_kwargs or {})
    kwargs.pop("revision", None)  # the policy's revision says nothing about another model
    kwargs.update(
        dtype=options.dtype or policy.dtype,
        attn_implementation=kwargs.get("attn_implementation") or policy.config._attn_implementation,
        trust_remote_code=kwargs.get("trust_remote_code", getattr(args, "trust_remote_code", False)),
    )
    if options.revision is not None:
        kwargs["revision"] = options.revision
    if options.quantization_config is not None:
        kwargs["quantization_config"] = BitsAndBytesConfig(**options.quantization_config)
    if options.device is not None:
        kwargs["device_map"] = {"": options.device}
    elif args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        kwargs["device_map"] = None
    return kwargs
