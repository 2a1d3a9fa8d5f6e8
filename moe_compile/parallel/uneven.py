"""The rows of a tensor that one rank holds, where ranks hold other numbers of them than `Shard(0)` gives.

Of a flat weight of three experts on two ranks the first has two thirds; a DTensor would cut an expert in two.  So state
dicts have a tensor that says where its rows belong.  torch.distributed.checkpoint writes and reads it in place.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from moe_compile.errors import MoeCompileError


class Rows(torch.Tensor):
    """A tensor of the shape of the whole, with a box of it, `local`, at some offsets.  Nothing computes with it."""

    local: Tensor
    offsets: tuple[int, ...]

    @staticmethod
    def __new__(cls, local: Tensor, offsets: tuple[int, ...], shape: Sequence[int]) -> "Rows":
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, torch.Size(shape), dtype=local.dtype, device=local.device
        )
        made.local, made.offsets = local, offsets
        found: Rows = made
        return found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default, torch.ops.aten._to_copy.default):
            rows = args[0]
            return Rows(func(rows.local, **(kwargs or {})), rows.offsets, rows.shape)
        raise MoeCompileError(
            f"{func} on a rank's rows of a flat weight whose experts the ranks do not divide: "
            f"moe_compile.parallel.checkpoint.model_state(model, full=True) gives whole tensors"
        )

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Rows({self.local}, offsets={self.offsets}, shape={tuple(self.shape)})"

    # -- what torch.distributed.checkpoint asks for ------------------------------------------

    def _chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(offsets=torch.Size(self.offsets), sizes=self.local.shape)

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.local)
        data = TensorWriteData(chunk=self._chunk(), properties=properties, size=self.shape)
        return [WriteItem(index=MetadataIndex(fqn, self.offsets), type=WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is None or tuple(index.offset) == self.offsets, (index, self.offsets)
        return self.local
