"""TRL's four trainer configurations, extended by the flags that select a reference."""

from __future__ import annotations

from dataclasses import dataclass

from trl import DPOConfig, GRPOConfig, KTOConfig, RLOOConfig

from trl_refplug.arguments import ReferenceArguments


@dataclass
class RefPlugDPOConfig(ReferenceArguments, DPOConfig):  # type: ignore[misc]
    """[`~trl.DPOConfig`] with the flags of [`ReferenceArguments`]."""

    _VALID_DICT_FIELDS = [*DPOConfig._VALID_DICT_FIELDS, "ref_provider_kwargs"]


@dataclass
class RefPlugKTOConfig(ReferenceArguments, KTOConfig):  # type: ignore[misc]
    """[`~trl.KTOConfig`] with the flags of [`ReferenceArguments`]."""

    _VALID_DICT_FIELDS = [*KTOConfig._VALID_DICT_FIELDS, "ref_provider_kwargs"]


@dataclass
class RefPlugGRPOConfig(ReferenceArguments, GRPOConfig):  # type: ignore[misc]
    """[`~trl.GRPOConfig`] with the flags of [`ReferenceArguments`]."""

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "ref_provider_kwargs"]


@dataclass
class RefPlugRLOOConfig(ReferenceArguments, RLOOConfig):  # type: ignore[misc]
    """[`~trl.RLOOConfig`] with the flags of [`ReferenceArguments`]."""

    _VALID_DICT_FIELDS = [*RLOOConfig._VALID_DICT_FIELDS, "ref_provider_kwargs"]
