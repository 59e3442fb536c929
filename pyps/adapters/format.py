"""The metadata of an adapter file (docs/method.md, section 6): only this module names its keys, reads and writes them.

A reader ignores keys that it does not know, so that later versions can add some.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import gguf
import numpy as np
from numpy.typing import NDArray

from pyps.adapters.mapper import FEATURES, Mapper, weight_shapes
from pyps.errors import InputError

LayoutName = Literal["shared", "paper"]
LAYOUTS: tuple[LayoutName, ...] = ("shared", "paper")

VERSION = 1

_TYPE = gguf.Keys.General.TYPE
_ARCH = gguf.Keys.General.ARCHITECTURE
_ADAPTER_TYPE = gguf.Keys.Adapter.TYPE
_ALPHA = gguf.Keys.Adapter.LORA_ALPHA
_VERSION = "pyps.version"
_LAYOUT = "pyps.layout"
_IN_ORDER = "pyps.in_order"
_BASE_NAME = "pyps.base.name"
_BASE_FINGERPRINT = "pyps.base.fingerprint"
_MAPPER_TYPE = "pyps.mapper.type"
_MAPPER_FEATURES = "pyps.mapper.features"
_MAPPER_HIDDEN = "pyps.mapper.hidden_dim"
_MAPPER_WEIGHTS = "pyps.mapper.{}"  # w1, b1, w2, b2: arrays of floats, row by row

_LORA = "lora"  # the only type of adapter that llama.cpp has
_AFFINE_MLP = "affine-mlp"  # the only type of mapper

# llama_adapter_lora_init aborts the process if one of the first four is of another type.
_VALUE_TYPES = {
    _TYPE: gguf.GGUFValueType.STRING,
    _ARCH: gguf.GGUFValueType.STRING,
    _ADAPTER_TYPE: gguf.GGUFValueType.STRING,
    _ALPHA: gguf.GGUFValueType.FLOAT32,
    _BASE_NAME: gguf.GGUFValueType.STRING,
    _BASE_FINGERPRINT: gguf.GGUFValueType.STRING,
}


@dataclass(frozen=True, kw_only=True)
class AdapterMetadata:
    """What an adapter file holds beside the tensors of its LoRA.

    Attributes:
        arch: The base model's architecture, as llama.cpp names it.
        alpha: The LoRA's alpha: llama.cpp multiplies its output by alpha / rank. It means nothing without a LoRA.
        layout: The prompt layout that it was trained for, or None if the file does not say.
        in_order: True if it was trained for spans that stand one after the other; False if all begin at the branch
            point.
        mapper: The mapper; None means the identity.
        base_name: general.name of the model that it was trained on, or "" if the file does not say.
        base_fingerprint: That model's Model.fingerprint, or "" if the file does not say.
    """

    arch: str
    alpha: float
    layout: LayoutName | None
    in_order: bool
    mapper: Mapper | None
    base_name: str
    base_fingerprint: str


def read_metadata(reader: gguf.GGUFReader) -> AdapterMetadata:
    """Read and check an adapter file's metadata.

    Raises:
        InputError: The file is not an adapter, is of another version, or has a key that is missing or malformed. The
            message names the key.
    """
    for key, expected in _VALUE_TYPES.items():
        if (field := reader.get_field(key)) and field.types[:1] != [expected]:
            raise InputError(f"{key} must be of type {expected.name}")
    values = {name: field.contents() for name, field in reader.fields.items()}
    if (kind := values.get(_TYPE)) != gguf.GGUFType.ADAPTER:
        raise InputError(f"not an adapter: {_TYPE} is {kind!r}, not {gguf.GGUFType.ADAPTER!r}")
    if (kind := values.get(_ADAPTER_TYPE)) != _LORA:
        raise InputError(f"{_ADAPTER_TYPE} is {kind!r}; pyps reads {_LORA!r}")
    if (version := values.get(_VERSION, VERSION)) != VERSION:
        raise InputError(f"{_VERSION} is {version}; this version of pyps reads {VERSION}")
    if reader.tensors and _ALPHA not in values:
        raise InputError(f"{_ALPHA} is missing")
    layout = values.get(_LAYOUT)
    if layout is not None and layout not in LAYOUTS:
        raise InputError(f"{_LAYOUT} is {layout!r}; this version of pyps knows {', '.join(LAYOUTS)}")
    in_order = values.get(_IN_ORDER, False)
    if not isinstance(in_order, bool):
        raise InputError(f"{_IN_ORDER} must be true or false")
    return AdapterMetadata(
        arch=values[_ARCH],
        alpha=values.get(_ALPHA, 1.0),
        layout=layout,
        in_order=in_order,
        mapper=read_mapper(values),
        base_name=values.get(_BASE_NAME, ""),
        base_fingerprint=values.get(_BASE_FINGERPRINT, ""),
    )


def read_mapper(values: Mapping[str, Any]) -> Mapper | None:
    """Return the mapper in an adapter file's metadata, given by key, or None if there is none.

    Raises:
        InputError: A key is missing or malformed; the message names it.
    """
    kind = values.get(_MAPPER_TYPE)
    if kind is None:
        return None
    if kind != _AFFINE_MLP:
        raise InputError(f"its mapper is of type {kind!r}; this version of pyps knows {_AFFINE_MLP!r}")
    features = values.get(_MAPPER_FEATURES)
    if not isinstance(features, list) or [name for name in FEATURES if name in features] != features:
        raise InputError(f"{_MAPPER_FEATURES} must be some of {', '.join(FEATURES)}, in this order")
    n_hidden = values.get(_MAPPER_HIDDEN)
    if not isinstance(n_hidden, int) or n_hidden <= 0:
        raise InputError(f"{_MAPPER_HIDDEN} is missing or not a positive number")
    shapes = weight_shapes(len(features), n_hidden)
    weights = {name: _read_floats(values, _MAPPER_WEIGHTS.format(name), shape) for name, shape in shapes.items()}
    return Mapper(tuple(features), **weights)


def _read_floats(values: Mapping[str, Any], key: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    floats = np.asarray(values.get(key, []))
    if floats.size != math.prod(shape) or (floats.size and floats.dtype.kind != "f"):
        raise InputError(f"{key} must be {list(shape)} floating-point numbers")
    return floats.astype(np.float32).reshape(shape)


def write_metadata(writer: gguf.GGUFWriter, metadata: AdapterMetadata) -> None:
    """Give a writer, made for metadata.arch, all keys of an adapter file."""
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(_ADAPTER_TYPE, _LORA)
    writer.add_float32(_ALPHA, metadata.alpha)
    writer.add_uint32(_VERSION, VERSION)
    if metadata.layout is not None:
        writer.add_string(_LAYOUT, metadata.layout)
    writer.add_bool(_IN_ORDER, metadata.in_order)
    writer.add_string(_BASE_NAME, metadata.base_name)
    writer.add_string(_BASE_FINGERPRINT, metadata.base_fingerprint)
    if (mapper := metadata.mapper) is None:
        return
    writer.add_string(_MAPPER_TYPE, _AFFINE_MLP)
    if mapper.features:  # GGUF has no empty arrays
        writer.add_array(_MAPPER_FEATURES, list(mapper.features))
    writer.add_uint32(_MAPPER_HIDDEN, len(mapper.b1))
    for name in weight_shapes(len(mapper.features), len(mapper.b1)):
        weights: NDArray[np.float32] = getattr(mapper, name)
        if weights.size:
            writer.add_array(_MAPPER_WEIGHTS.format(name), [float(x) for x in weights.ravel()])
