"""Random mixture-of-experts modules as source text: a grammar of how people write them, and edits that change them.

A program is a list of named lines (parts.py).  The grammar fills them from independent choices: who is chosen, how rows
are selected (loop_forms.py, forms.py), what an expert computes and in which function (bodies.py), where the routing
weights go, how results are added.  An edit (edits.py) changes one line, often only slightly, and often so that another
function comes out.  Whether it does nobody needs to know: the check is that whatever is rewritten has the numbers of what
was written.
"""

from random import Random

from tests.fuzz import forms
from tests.fuzz.bodies import one_of
from tests.fuzz.edits import edit
from tests.fuzz.loop_forms import loop
from tests.fuzz.parts import LAYOUTS, Parts

FORMS = {  # how it is filled, in which layouts, how often
    "loop": (loop, sorted(LAYOUTS), 14),
    "dense": (forms.dense, sorted(LAYOUTS), 2),
    "gathered": (forms.gathered, sorted(LAYOUTS), 2),
    "choice": (forms.choice, sorted(LAYOUTS), 3),
    "slots": (forms.slots, sorted(LAYOUTS), 2),
    "repeated": (forms.repeated, sorted(LAYOUTS), 2),
    "sorted": (forms.sorted_rows, sorted(LAYOUTS), 2),
    "sliced": (forms.sliced, sorted(LAYOUTS), 3),
    "every": (forms.every, ["stacked", "transposed"], 1),
    "batched": (forms.batched, ["stacked", "transposed"], 1),
}
SIZES = (  # how many experts, and from how many on one visit may stand for many
    (3, 8),
    (4, 8),
    (5, 2),
    (5, 2),
    (9, 8),
)


def program(number: int) -> Parts:
    """The program of a number."""
    return drawn(Random(number))


def drawn(draw: Random) -> Parts:
    """A program with none, one or two edits."""
    form = one_of(draw, *(name for name, (_, _, often) in FORMS.items() for _ in range(often)))
    fill, layouts, _ = FORMS[form]
    experts, few = one_of(draw, *SIZES)
    parts = Parts(form, one_of(draw, *layouts), experts, draw.randint(1, 3), draw.random() < 0.5, few)
    if draw.random() < 0.5:
        parts.distinct = True
        parts.router = [
            "probs = F.linear(x, self.gate).softmax(-1)",
            one_of(draw, "weights, ids = probs.topk(K, dim=-1)", "weights, ids = torch.topk(probs, K)"),
            *one_of(draw, [], ["weights = weights / weights.sum(-1, keepdim=True)"], ["weights = weights * 2.5"]),
        ]
    fill(draw, parts)
    for _ in range(one_of(draw, 0, 1, 1, 1, 1, 1, 2, 2)):
        edit(draw, parts)
    return parts
