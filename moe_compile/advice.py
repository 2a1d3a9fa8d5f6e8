"""What would help a refused region: advice by the fixed words of its reason.

An entry whose words occur in no reason is dead; tests/test_explain.py holds the table against the sources.
"""

RULE = "a rule for this op, if rows stay independent of each other: CONTRIBUTING.md says how to add one"
OUTSIDE = "move it out of the function that sums the experts"
PLAIN = "keep it as a plain number, string, tensor or module of the experts' own module"
TOPK = "ids taken directly from torch.topk in the calling function, which are known to be distinct"

ADVICE: tuple[tuple[str, str], ...] = (
    # Python around the loop
    ("has hooks", "put the hook on the module that holds the experts, or remove it"),
    ("hooks for all modules", "remove the hooks of torch.nn.modules.module while the model compiles"),
    ("is compiled on its own", "compile the outer module only"),
    ("sets the attribute", f"return what it stores, or {OUTSIDE}"),
    ("changes its attribute", f"return what it stores, or {OUTSIDE}"),
    ("sets the global", f"return what it stores, or {OUTSIDE}"),
    (" calls print", OUTSIDE),
    (" calls input", OUTSIDE),
    ("sets the state of random numbers", OUTSIDE),
    (
        "custom autograd function",
        "plain operations, whose gradients a trace shows; or apply it around the experts",
    ),
    ("puts a hook on a tensor", OUTSIDE),
    ("which cannot be guarded", PLAIN),
    ("cannot be guarded: Dynamo has no name", "define it in a module, not while the model is being compiled"),
    ("is not available", "define the function in a file, whose source can be read"),
    ("has a while loop", "a for loop over the experts"),
    ("leaves a loop early", "a loop that visits every expert; one without rows adds nothing"),
    ("from one iteration to the next", "iterations that are independent of each other"),
    ("nested structure", "return a tensor, or a flat tuple of tensors"),
    ("an argument is neither a tensor", "pass tensors and numbers to the function that sums the experts"),
    ("Python decides on data", "conditions only on whether an expert has rows; without rows it adds nothing anyway"),
    ("Python counts the experts", "iterate over the chosen experts, whose number no result depends on"),
    # what an expert computes
    ("it reads sumread", "experts that read their input, not the sum so far"),
    ("is not known to be row-wise", RULE),
    ("no rule for", RULE),
    ("reduces over all rows", "reduce over features: who else was routed to an expert must not matter"),
    ("lets rows depend on each other", "work along features: who else was routed to an expert must not matter"),
    ("normalises across rows", "normalise over features: who else was routed to an expert must not matter"),
    ("draws random numbers", "dropout of p = 0 in the experts, or behind the sum over them"),
    ("runs under no_grad", "run the experts under one grad mode"),
    ("autocast region of its own", "enter autocast around the module, not inside the loop"),
    # who is added where
    ("chose an expert twice", TOPK),
    ("not each of 0..", "a loop that visits all experts once each"),
    ("overwrites what another expert", "add with index_add_ or +=, do not assign"),
    ("memory that was never set", "start from zeros"),
    ("changed in place while", "read a copy, or write into a new tensor"),
    ("share their loops", "a function, or a loop, for each sum"),
    # ours
    ("is left out", "leave the pass out of the option `skip`"),
    ("proof failed with", "a report of this fault of moe_compile, with the output of TORCH_LOGS=+moe_compile"),
)


def advice(reason: str) -> str | None:
    """What would let the region be rewritten, or None if nothing is known to."""
    return next((text for words, text in ADVICE if words in reason), None)
