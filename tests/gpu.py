"""A pretended GPU: tensors that compute on the CPU but say that they are on the device "meta".

As with a real one, an operation on tensors of both devices raises RuntimeError. `PretendedGpu`
notes what the CPU would have to wait for. It cannot show a GPU's own kernels, their speed and
rounding.
"""

from collections import Counter

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
MASKS = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}  # x[mask]
READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default,
         aten.masked_select.default}  # the CPU needs their result


class GpuTensor(torch.Tensor):
    """`raw` is the CPU tensor that holds the numbers."""

    @staticmethod
    def __new__(cls, raw: torch.Tensor):
        gpu = torch.Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(),
            dtype=raw.dtype, device="meta")
        gpu.raw = raw
        return gpu

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of PretendedGpu")


class PretendedGpu(TorchDispatchMode):
    """Inside, the device "meta" is the GPU. Afterwards, what happened can be read:

    syncs: operations for which the CPU waited for the GPU.
    lost: sources of copies that may still run when their memory is given to others.
    ops: the number of calls of each operation on the GPU.
    """

    def __init__(self):
        super().__init__()
        self.syncs, self.lost, self.ops = [], [], Counter()
        self.pending = []  # sources of copies since the last wait

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        on_gpu = [isinstance(tensor, GpuTensor) for tensor in tensors]
        to_gpu = torch.device("meta") in leaves
        if not any(on_gpu) and not to_gpu:
            return func(*args, **kwargs)
        self.ops[func] += 1
        if func in (aten._to_copy.default, aten.copy_.default):
            return self.copy(func, args, kwargs)
        if any(on_gpu) and any(tensor.ndim for tensor in tensors
                               if not isinstance(tensor, GpuTensor)):
            raise RuntimeError(f"{func}: expected all tensors to be on the same device")
        has_mask = any(tensor.dtype == torch.bool for tensor in tensors[1:])
        if func in READS or func in MASKS and has_mask:
            self.wait(str(func))
        raw_args, raw_kwargs = tree_map_only(GpuTensor, lambda tensor: tensor.raw, (args, kwargs))
        out = func(*raw_args, **raw_kwargs | ({"device": "cpu"} if to_gpu else {}))
        if func._schema.is_mutable:  # in place
            return args[0]
        return tree_map_only(torch.Tensor, GpuTensor, out)

    def copy(self, func, args, kwargs):
        """`x.to(...)` and `x.copy_(source)`."""
        is_to = func is aten._to_copy.default
        source = args[0] if is_to else args[1]
        from_gpu = isinstance(source, GpuTensor)
        device = torch.device(kwargs.get("device") or source.device) if is_to else args[0].device
        if device.type != source.device.type and from_gpu:
            self.wait("a copy to the CPU")
        elif device.type != source.device.type and kwargs.get("non_blocking"):
            self.pending.append(StorageWeakRef(source.untyped_storage()))
        raw_args = [arg.raw if isinstance(arg, GpuTensor) else arg for arg in args]
        out = func(*raw_args, **kwargs | ({"device": "cpu"} if is_to else {}))
        if not is_to:
            return args[0]
        return GpuTensor(out) if device.type == "meta" else out

    def wait(self, reason: str) -> None:
        self.syncs.append(reason)
        self.lost += [source for source in self.pending if source.expired()]
        self.pending = []

    def move(self, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        """`model.to(the GPU, dtype)`, for inference."""
        for module in model.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    raw = weight.detach().to("cpu", dtype)
                    module._parameters[name] = nn.Parameter(GpuTensor(raw), requires_grad=False)
        return model
