"""A device that is not there: tensors that say they are on `far:0`, computed on the CPU, and never mixed with its own.

What a GPU refuses is refused here too, on any machine: an operation on tensors of two devices (but numbers, and indices
of the CPU), and a generator of another device. A tensor wraps one of the CPU; a mode sees every operation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

aten = torch.ops.aten
ACROSS = {aten._to_copy.default, aten.copy_.default}  # what may read one device and write the other
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
STORAGE = (torch.Tensor.untyped_storage, torch.Tensor.storage, torch.Tensor.data_ptr)
FROM_DATA = (torch.tensor, torch.as_tensor, torch.asarray)


class Backend(_DummyBackendModule):  # type: ignore[misc]
    """`torch.far`."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def synchronize(self, device: object = None) -> None:
        pass


_setup_privateuseone_for_python_backend("far", Backend())
FAR = torch.device("far", 0)


def is_far(device: Any) -> bool:
    return device is not None and torch.device(device).type == FAR.type


class Far(torch.Tensor):
    """A tensor of the far device."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Far:
        found: Far = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=FAR,
        )  # fmt: skip
        found.inner = inner
        return found

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Far({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Any, args: Any, kwargs: Any) -> Any:
    """One operation, on the device that its tensors are on; RuntimeError where they are on two."""
    if func is aten.to.device or (torch.is_inference_mode_enabled() and func._can_decompose()):
        with Dispatch():  # in inference mode what is made of other operations comes here whole
            if func is aten.to.device:
                return aten._to_copy(args[0], device=args[1], dtype=args[2])
            return func.decompose(*args, **kwargs)
    leaves = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    far, asked = [t for t in leaves if isinstance(t, Far)], kwargs.get("device")
    if not far and not is_far(asked):
        return func(*args, **kwargs)
    if far and func not in ACROSS:
        if func in INDEXED and isinstance(args[0], Far):
            leaves = [args[0], *(t for t in args[2:3] if isinstance(t, torch.Tensor))]
        near = [tuple(t.shape) for t in leaves if t.dim() and not isinstance(t, Far)]
        if near:
            raise RuntimeError(f"{func}: tensors on {FAR} and, of shapes {near}, on cpu in one operation")
    bare, named = tree_map_only(Far, lambda t: t.inner, (args, kwargs))
    if asked is not None:
        named = {**named, "device": torch.device("cpu"), "pin_memory": False}
    found = func(*bare, **named)
    if func is aten._local_scalar_dense.default:
        return found
    if func is aten.copy_.default:
        return args[0]
    if func is aten._to_copy.default:
        if is_far(asked) or (asked is None and far):
            return Far(found)
        return found.clone() if found is bare[0] else found
    out = tree_map_only(torch.Tensor, Far, found)
    return return_and_correct_aliasing(func, args, kwargs, out) if far else out


class Dispatch(TorchDispatchMode):
    """Sees every operation, those that make a tensor too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class Function(TorchFunctionMode):
    """What PyTorch does without telling a dispatch mode, or chooses a kernel of the device for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], Far) else None
        if (generator := kwargs.get("generator")) is not None:
            far = is_far(kwargs.get("device")) or any(isinstance(t, Far) for t in tree_leaves(args))
            if far != (id(generator) in Generator.far):
                raise RuntimeError(f"{func}: a generator of another device")
        if func in FROM_DATA and is_far(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        if first is None:
            return func(*args, **kwargs)
        if func == torch.Tensor.data.__set__:  # type: ignore[attr-defined]
            first.inner = args[1].inner
        elif func in STORAGE:
            return func(first.inner)
        elif func is torch.Tensor.tolist:
            return first.cpu().tolist()
        elif func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = (first, tuple(torch.tensor(i) if isinstance(i, list) else i for i in index), *args[2:])
        elif func is torch.nn.functional.scaled_dot_product_attention:
            given = dict(zip(("attn_mask", "dropout_p", "is_causal"), args[3:], strict=False)) | kwargs
            return aten._scaled_dot_product_attention_math(*args[:3], **given)[0]
        return func(*args, **kwargs)


class Generator:
    """In the place of `torch.Generator`: one of the CPU, that remembers which device it was made for."""

    make = torch.Generator
    far: dict[int, torch.Generator] = {}  # noqa: RUF012

    def __new__(cls, device: Any = "cpu") -> Any:
        found = cls.make("cpu")
        if is_far(device):
            cls.far[id(found)] = found
        return found


@contextlib.contextmanager
def faraway() -> Iterator[torch.device]:
    """Within it the device `far:0` can be used."""
    move = torch.nn.Module.to

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = move(self, *args, **kwargs)
        if hasattr(found, "tie_weights"):  # PyTorch makes new parameters of wrappers, two where one was tied
            found.tie_weights()
        return found

    torch.nn.Module.to = to  # type: ignore[method-assign]
    torch.Generator = Generator  # type: ignore[misc, assignment]
    try:
        with Function(), Dispatch():
            yield FAR
    finally:
        torch.nn.Module.to = move  # type: ignore[method-assign]
        torch.Generator = Generator.make  # type: ignore[misc]
        Generator.far.clear()
