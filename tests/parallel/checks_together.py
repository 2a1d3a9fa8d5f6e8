"""What holds of several things at once, on numbers of ranks on which each alone has no check of its own."""

import torch

from tests.parallel import checks
from tests.parallel.checks import Checkpointed, own_names, parity, tokens, under_autocast
from tests.parallel.ranks import Ranks
from tests.tiny import Experts, Net, close, compiled, regions


def together(ranks: Ranks) -> None:
    """Batches of many sizes and none, accumulated gradients, a checkpointed layer; then no gradients; then autocast."""

    def make() -> Net:
        return Net(1, lambda: Checkpointed(Experts(checks.E), num_experts=checks.E))

    batches = tokens(ranks, [20, 0, 3, 9, 1, 6, 0, 13])
    model = parity(ranks, make(), batches, inner="aot_eager", parts=2, steps=1)
    reference = make()
    reference.load_state_dict(own_names(model, lambda p: p.data))
    call = compiled(model, fullgraph=True, strategy="alltoall")
    with torch.no_grad(), regions() as found:
        assert close(call(*batches[ranks.rank]), reference(*batches[ranks.rank]))
    assert {r.strategy for r in found} == {"alltoall" if ranks.size > 1 else "grouped"}, [str(r) for r in found]
    torch._dynamo.reset()
    under_autocast(ranks, make(), batches)


CHECKS = {1: [together], 8: [together]}
