"""Gradients of an ordinary loop: those of the mean, over the ranks, of each rank's loss.

That is what one process computes which adds up the ranks' losses and divides by their number.  A dense parameter's
gradient is averaged over all ranks at the end of every backward, in one all-reduce for each dtype.  Averaging is
linear, so gradients may be accumulated over several backwards.  Ranks along "tp" have one batch and so one loss: the
mean over all ranks is that over the batches.  What is split over "tp" is averaged over the ranks with the same part.

Of an expert's DTensor the compiled code sees the local tensor alone, which is a leaf of its own.  Its gradient has the
tokens of all ranks of "ep" in it already: divided by their number it is added to the DTensor's, and averaged over
"dp_replicate" with the others.  Ranks along "tp" ran a part of the tokens each, so it is multiplied by their number
before the mean over them.  If it is split over "edp" too, the graph has added it up over these ranks, and it is
divided by their number instead of averaged.  Where whole weights were gathered (gather.py), they are leaves, and their
gradients are summed over these ranks first; each rank along "tp" ran all tokens then.

All ranks have to call backward equally often.  A parameter that got no gradient on some ranks counts as zero there.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial
from torch.utils._pytree import tree_leaves

from moe_compile.errors import MoeCompileError
from moe_compile.parallel.mesh import dense_mesh, tp_mesh
from moe_compile.parallel.shards import holders
from moe_compile.parallel.shared_tokens import TOLERANCE, token_message

ATTRIBUTE = "_moe_ep_gradients"
MARK = "_moe_ep_averaged"


class Gathered:
    """Whole weights of a forward that gathered them: the gradient that this rank has for them, not yet summed."""

    def __init__(self, packed: DTensor, whole: Tensor, arrived: Callable[[Tensor], None]) -> None:
        self.packed, self.whole = packed, weakref.ref(whole)
        self.gradient: Tensor | None = None

        def take(whole: Tensor) -> None:
            arrived(whole)
            assert whole.grad is not None
            self.gradient = whole.grad if self.gradient is None else self.gradient + whole.grad
            whole.grad = None

        whole.register_post_accumulate_grad_hook(take)


class Averages:
    """Averages the gradients of one model.  `attach` again, where parameters may have been replaced by others."""

    def __init__(self, model: nn.Module, mesh: DeviceMesh, splits_experts: bool = False) -> None:
        self.model = weakref.ref(model)
        self.ep = mesh["ep"].size()
        self.edp = mesh["edp"].get_group() if splits_experts else None  # what experts are split over, beside "ep"
        apart = ("ep", "edp") if splits_experts else ("ep",)
        self.copies = [mesh[d].get_group() for d in mesh.mesh_dim_names or () if d not in apart and mesh[d].size() > 1]
        self.dense = dense_mesh(mesh)  # what FSDP has the dense parameters on, and averages their gradients over
        self.replicas = [] if self.dense is None or self.dense.ndim == 1 else [self.dense["dp_replicate"].get_group()]
        self.tp = None if (tp := tp_mesh(mesh)) is None else tp.get_group()
        self.parts = 1 if tp is None else tp.size()  # of a batch, each run by one rank
        names = [d for d in mesh.mesh_dim_names or () if d != "tp" and mesh[d].size() > 1]
        self.others = [mesh[d].get_group() for d in names]  # with the same part of what is split over "tp"
        self.checked = False
        self.gathered: list[Gathered] = []  # in the order of the forwards, which is the same on all ranks
        self._task = -1  # the backward that will average at its end

    def attach(self) -> None:
        """Put hooks on the parameters that have none yet."""
        for parameter, is_expert in self.parameters():
            if is_expert:
                self._attach_local(parameter)
            elif self.dense is not None:
                continue
            if parameter.requires_grad and not getattr(parameter, MARK, False):
                parameter.register_post_accumulate_grad_hook(self._arrived)
                setattr(parameter, MARK, True)

    def _attach_local(self, packed: Any) -> None:
        local: Tensor = packed._local_tensor
        local.requires_grad_(packed.requires_grad)
        if not packed.requires_grad or getattr(local, MARK, None) is packed:
            return

        def take(local: Tensor) -> None:
            assert local.grad is not None
            if packed.requires_grad:
                ranks = self.ep if self._copied_over_edp(packed) else self.ep * dist.get_world_size(self.edp)
                add(packed, _like(packed, _scaled(local.grad, self.parts / ranks)))
            local.grad = None
            self._arrived(local)

        local.register_post_accumulate_grad_hook(take)
        setattr(local, MARK, packed)

    def copied(self) -> list[tuple[nn.Parameter, list[Any]]]:
        """Each parameter, and the groups of ranks that hold the same of it."""
        found: list[tuple[nn.Parameter, list[Any]]] = []
        for parameter, is_expert in self.parameters():
            if is_expert:
                also = [self.edp] if self.edp is not None and self._copied_over_edp(parameter) else []
                found.append((parameter, [*self.copies, *also]))
            elif isinstance(parameter, DTensor):
                names = parameter.device_mesh.mesh_dim_names or ()
                alike = self.replicas if "dp_shard" in names else self.others
                if self.tp is not None and not _split_over_tp(parameter):
                    alike = [*alike, self.tp]
                found.append((parameter, alike))
            else:
                found.append((parameter, [None]))
        return found

    def _copied_over_edp(self, packed: Any) -> bool:
        """Whether all ranks with the same experts hold the whole of this weight of theirs."""
        return self.edp is None or bool(packed.placements[0].is_replicate())

    def parameters(self) -> list[tuple[nn.Parameter, bool]]:
        model = self.model()
        if model is None:
            return []
        held = [(h, s) for _, h, s in holders(model) if s.state == "sharded"]
        experts = {id(h._parameters[f.name]) for h, s in held for f in s.families}
        return [(p, id(p) in experts) for p in model.parameters()]

    def expect(self, output: Any) -> None:
        """Average at the end of the backward that reaches these results, whatever it reaches beyond."""
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(self._arrived)

    def _arrived(self, tensor: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if task != self._task:
            if self._task == -1:
                self._forget()
            self._task = task
            torch.autograd.Variable._execution_engine.queue_callback(self._average)

    @torch.no_grad()
    def _average(self) -> None:
        self._task = -1
        if not self.checked:
            self.checked = True
            check_equal(self)
            if self.dense is None:
                check_whole(self)
            else:  # behind FSDP, which adds up the last gradients at the end of a backward too
                torch.autograd.Variable._execution_engine.queue_callback(lambda: check_whole(self))
        self._sum_gathered()
        pairs = [(p, is_expert) for p, is_expert in self.parameters() if p.requires_grad]
        if self.dense is None:
            split = [p for p, is_expert in pairs if not is_expert and isinstance(p, DTensor)]
            for group in self.others:
                _all_reduce([_settled(p) for p in split], group)
            _all_reduce([p for p, is_expert in pairs if not is_expert and not isinstance(p, DTensor)], None)
        for group in self.copies:
            _all_reduce([p for p, is_expert in pairs if is_expert], group)
        if self.edp is not None:
            _all_reduce([p for p, is_expert in pairs if is_expert and self._copied_over_edp(p)], self.edp)

    def gather(self, packed: DTensor, whole: Tensor) -> None:
        """Note that a forward reads the whole of a parameter."""
        if torch._C._current_graph_task_id() == -1:
            self._forget()
        self.gathered.append(Gathered(packed, whole, self._arrived))

    def _forget(self) -> None:
        """Drop what a backward left that did not come to its end."""
        for found in self.gathered:
            found.gradient = None

    def _sum_gathered(self) -> None:
        """Each rank gets, for its own experts, the sum over the ranks; those without a gradient take part."""
        if not self.gathered:
            return
        mesh = self.gathered[0].packed.device_mesh
        state = [(g.gradient is not None, g.whole() is not None) for g in self.gathered]
        counts = torch.tensor(state, dtype=torch.int64, device=self.gathered[0].packed.device)
        for dim in range(mesh.ndim):
            dist.all_reduce(counts, group=mesh.get_group(dim))
        for found, (some, _) in zip(self.gathered, counts.tolist(), strict=True):
            if some:
                packed, mine = found.packed, found.gradient
                if mine is None:
                    mine = torch.zeros(packed.shape, dtype=packed.dtype, device=packed.device)
                partial = [Partial()] * mesh.ndim
                summed = DTensor.from_local(mine.to(packed.dtype), packed.device_mesh, partial, run_check=False)
                add(packed, summed.redistribute(placements=packed.placements) / mesh.size())
                found.gradient = None
        self.gathered = [g for g, (_, alive) in zip(self.gathered, counts.tolist(), strict=True) if alive]


def attach(module: nn.Module) -> None:
    """Put hooks on the parameters of the model that a module with sharded experts belongs to."""
    for averages in {shards.averages for _, _, shards in holders(module)}:
        averages.attach()


def add(parameter: Tensor, gradient: Tensor) -> None:
    """Accumulate a gradient, in place where torch does: a copy of all experts' gradients is the peak of a step."""
    if parameter.grad is None or torch.is_grad_enabled():
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    else:
        parameter.grad += gradient


def _scaled(gradient: Tensor, factor: float) -> Tensor:
    """A multiple of a gradient that nobody else holds, in its memory unless it has a gradient itself."""
    return gradient * factor if torch.is_grad_enabled() else gradient.mul_(factor)


def _all_reduce(parameters: list[nn.Parameter], group: Any) -> None:
    """Replace gradients by their mean over a group, in one collective a dtype."""
    ranks = dist.get_world_size(group)
    if ranks == 1:
        return
    for dtype in sorted({p.dtype for p in parameters}, key=str):
        mine = [p for p in parameters if p.dtype == dtype]
        grads = [None if p.grad is None else _local(p.grad) for p in mine]
        parts = [g if g is not None else torch.zeros_like(_local(p)) for p, g in zip(mine, grads, strict=True)]
        some = torch.tensor([float(g is not None) for g in grads], dtype=dtype, device=parts[0].device)
        flat = torch.cat([some, *(p.reshape(-1) for p in parts)])
        dist.all_reduce(flat, group=group)
        some, *means = flat.split([len(mine), *(p.numel() for p in parts)])
        for p, g, mean, count in zip(mine, grads, means, some.tolist(), strict=True):
            if g is not None:
                g.copy_(mean.view(g.shape) / ranks)
            elif count:
                p.grad = _like(p, mean.view(_local(p).shape) / ranks)


def _split_over_tp(parameter: Tensor) -> bool:
    """Whether ranks that share their tokens have parts of it."""
    if not isinstance(parameter, DTensor) or "tp" not in (names := parameter.device_mesh.mesh_dim_names or ()):
        return False
    return not parameter.placements[names.index("tp")].is_replicate()


def _settled(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter; what ranks along "tp" have yet to add up of its gradient is added up."""
    grad = parameter.grad
    if isinstance(parameter, DTensor) and isinstance(grad, DTensor) and grad.placements != parameter.placements:
        parameter.grad = grad.redistribute(placements=parameter.placements)
    return parameter


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _like(parameter: Tensor, local: Tensor) -> Tensor:
    """A gradient for a parameter, of the kind that it is."""
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape,
        stride=parameter.stride(),
    )  # fmt: skip


# -- equal weights --------------------------------------------------------------------------


@torch.no_grad()
def broadcast(model: nn.Module) -> None:
    """Give all ranks the dense parameters and buffers of rank 0, and all copies of a shard those of the first."""
    averages: Averages = vars(model)[ATTRIBUTE]
    for parameter, groups in averages.copied():
        for group in reversed(groups):
            _send(parameter, group)
    for buffer in model.buffers():
        _send(buffer, None)


def _send(tensor: Tensor, group: Any) -> None:
    if tensor.device.type != "meta":
        first = 0 if group is None else dist.get_global_rank(group, 0)
        dist.broadcast(_local(tensor).data, first, group=group)


@torch.no_grad()
def check_equal(averages: Averages) -> None:
    """Raise if copies of a parameter differ: no average of gradients would make sense."""
    if (model := averages.model()) is None:
        return
    names = {id(p): n for n, p in model.named_parameters()}
    found = averages.copied()
    for group in dict.fromkeys(group for _, groups in found for group in groups):
        mine = [p for p, groups in found if group in groups]
        sums = torch.stack([_local(p).double().sum() for p in mine])
        low, high = sums.clone(), sums.clone()
        dist.all_reduce(low, dist.ReduceOp.MIN, group=group)
        dist.all_reduce(high, dist.ReduceOp.MAX, group=group)
        differs = (low != high) & ~sums.isnan()
        if differs.any():
            name = names[id(mine[int(differs.nonzero()[0])])]
            raise MoeCompileError(
                f"{name} differs between ranks: after to_empty and an initialisation of one's own, call "
                f"moe_compile.parallel.gradients.broadcast(model) once, or load the same weights on every rank"
            )


@torch.no_grad()
def check_whole(averages: Averages) -> None:
    """Raise if ranks along "tp" got different gradients for a parameter that is not split over them.

    It was read where each has a part: of the heads, say, between layers that a plan splits.
    """
    model = averages.model()
    if averages.tp is None or model is None:
        return
    names = {id(p): n for n, p in model.named_parameters()}
    mine = [p for p, is_expert in averages.parameters() if not is_expert and not _split_over_tp(p)]
    mine = [
        p for p in mine if p.requires_grad and _local(p).numel() and (averages.dense is None) != isinstance(p, DTensor)
    ]
    if not mine:
        return
    if mine[0].is_cuda:
        torch.cuda.synchronize()  # FSDP adds up gradients in streams of its own
    grads = [torch.zeros_like(_local(p)) if p.grad is None else _local(p.grad) for p in mine]
    told = torch.stack([token_message([g.reshape(1, -1)])[1:] for g in grads])
    low, high = told.clone(), told.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN, group=averages.tp)
    dist.all_reduce(high, dist.ReduceOp.MAX, group=averages.tp)
    norms = high[:, -1]
    differs = ((high - low) > TOLERANCE * norms[:, None]).any(1) & (norms > 1e-5 * norms.norm())  # rounding is not told
    if differs.any():
        raise MoeCompileError(
            f"the gradient of {names[id(mine[int(differs.nonzero()[0])])]} differs between ranks that share their "
            f'tokens ("tp"): either they were given other batches, or it is read where each has a part of the features '
            f"or of the sequence, and needs a place in the plan of parallelize_module (SequenceParallel)"
        )
