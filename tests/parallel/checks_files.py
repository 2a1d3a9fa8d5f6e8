"""What holds on several ranks of weights in Hugging Face's layout: who reads and writes what, and what is refused."""

import functools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import safetensors
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import moe_compile
from moe_compile.parallel.checkpoint import model_state
from tests import family_models
from tests.parallel import checks
from tests.parallel.checks import agree, language, listed, mixtral, refusal, stacked, tokens
from tests.parallel.checks_fsdp import equal, shared_directory
from tests.parallel.ranks import Ranks
from tests.tiny import close

MESHES: dict[int, list[dict[str, int]]] = {
    2: [{}, {"dp_shard": 2}],
    4: [{"ep": 2, "dp_replicate": 2}, {"ep": 2, "dp_shard": 2, "dp_replicate": 2}, {"ep": 2, "dp_shard": 4}],
}


class Slice:
    """Counts the bytes that leave a slice of a file."""

    def __init__(self, inner: Any, counted: list[int]) -> None:
        self.inner, self.counted = inner, counted

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __getitem__(self, index: Any) -> Tensor:
        found: Tensor = self.inner[index]
        self.counted.append(found.nbytes)
        return found


class Opened(Slice):
    def get_slice(self, name: str) -> Slice:
        return Slice(self.inner.get_slice(name), self.counted)

    def get_tensor(self, name: str) -> Tensor:
        found: Tensor = self.inner.get_tensor(name)
        self.counted.append(found.nbytes)
        return found


@contextmanager
def bytes_read() -> Iterator[list[int]]:
    counted: list[int] = []
    opened = safetensors.safe_open
    with mock.patch.object(safetensors, "safe_open", lambda *args, **kw: Opened(opened(*args, **kw), counted)):
        yield counted


def total(ranks: Ranks, mine: int) -> int:
    every: list[Any] = [None] * ranks.size
    dist.all_gather_object(every, mine)
    return sum(every)


def contents(path: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in sorted(os.listdir(path)):
        if name.endswith(".safetensors"):
            with safetensors.safe_open(os.path.join(path, name), framework="pt") as file:
                found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dict
    return found


def meta(make: Callable[[], nn.Module], **degrees: int) -> nn.Module:
    with torch.device("meta"):
        model = make()
    return moe_compile.parallelize(model, moe_compile.build_mesh(**degrees))


def held(model: nn.Module) -> int:
    """The bytes of experts that this rank has."""
    experts = {n: p for n, p in model.named_parameters() if "expert" in n and isinstance(p, DTensor)}
    return sum(p.to_local().nbytes for p in experts.values())


def from_transformers(ranks: Ranks) -> None:
    """A checkpoint with one tensor an expert, as transformers writes it, into shards of stacks; every byte is read
    once.  Trained a step, it is saved in the same layout, and `from_pretrained` gives the same model."""
    from transformers import MixtralForCausalLM

    make = functools.partial(mixtral, "eager", tie_word_embeddings=True)
    for degrees in MESHES[ranks.size]:
        path = shared_directory(ranks)
        torch.manual_seed(0)
        reference = make()
        if not ranks.rank:
            reference.save_pretrained(f"{path}/first", max_shard_size="10KB")
        dist.barrier()
        names = contents(f"{path}/first")
        assert "model.layers.1.block_sparse_moe.experts.0.w1.weight" in names
        model = meta(make, **degrees)
        with bytes_read() as counted:
            moe_compile.load_safetensors(model, f"{path}/first")
        assert total(ranks, sum(counted)) == sum(t.nbytes for t in names.values()), degrees
        dense = sum(p.nbytes for n, p in reference.named_parameters() if "expert" not in n)
        assert sum(counted) <= held(model) + dense
        assert model.lm_head.weight is model.model.embed_tokens.weight
        equal(model_state(model, full=True), dict(reference.state_dict()))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        ids = torch.randint(0, 32, (2, 5))
        language(model, ids).backward()
        optimizer.step()
        with torch.no_grad():
            model(ids)  # FSDP leaves the root's parameters whole
        moe_compile.save_safetensors(torch.compile(model, backend="moe_ep"), f"{path}/then", 20_000)
        want = model_state(model, full=True)
        reference.load_state_dict(want)
        assert contents(f"{path}/then").keys() == names.keys()
        read = MixtralForCausalLM.from_pretrained(f"{path}/then", experts_implementation="eager")
        equal(dict(read.state_dict()), want)
        with torch.no_grad():
            assert torch.equal(read(ids).logits, reference(ids).logits)


def of_other_models(ranks: Ranks) -> None:
    """Stacks that stay stacks, and lists: each rank writes the experts of a list that it has; read on any mesh."""
    for make in (stacked, listed):
        path = shared_directory(ranks)
        for number, degrees in enumerate(MESHES[ranks.size]):
            torch.manual_seed(number)
            reference = make()
            model = moe_compile.parallelize(make(), moe_compile.build_mesh(**degrees))
            model.load_state_dict(reference.state_dict())
            with open(os.path.join(path, f"of_{ranks.rank}"), "w") as file:
                file.write("the user's")
            moe_compile.save_safetensors(model, path)  # over the last
            assert len([n for n in os.listdir(path) if n.startswith("of_")]) == ranks.size
            equal(contents(path), dict(reference.state_dict()))
            for others in MESHES[ranks.size]:
                read = meta(make, **others)
                with bytes_read() as counted:
                    moe_compile.load_safetensors(read, path)
                assert total(ranks, sum(counted)) == sum(t.nbytes for t in contents(path).values())
                equal(model_state(read, full=True), dict(reference.state_dict()))
                assert agree(ranks, read, read, reference, tokens(ranks, [5, 2])), "gradients after it was read"
                reference.zero_grad()
            one = make()
            dist.barrier()
            if not ranks.rank:
                os.rename(path, path + ".previous")  # as a job leaves it that is killed between the two renames
            dist.barrier()
            moe_compile.load_safetensors(one, path)
            dist.barrier()
            if not ranks.rank:
                os.rename(path + ".previous", path)
            dist.barrier()
            equal(dict(one.state_dict()), dict(reference.state_dict()))


def families(ranks: Ranks, names: tuple[str, ...] = ("deepseek_v3", "gpt_oss", "inkling")) -> None:
    """Read and written as transformers does, whatever it converts: experts, buffers, dense weights in several parts."""
    for name in names:
        built = family_models.build(name, "eager")
        assert not isinstance(built, str), built
        reference, ids = built
        path = shared_directory(ranks)
        if not ranks.rank:
            reference.save_pretrained(f"{path}/first")
        dist.barrier()
        model = meta(functools.partial(type(reference), reference.config), dp_shard=ranks.size)
        moe_compile.load_safetensors(model, f"{path}/first")
        weights = model_state(model, full=True)
        equal({n: weights[n] for n in reference.state_dict()}, dict(reference.state_dict()))
        moe_compile.save_safetensors(model, f"{path}/then", 50_000)
        equal(contents(f"{path}/then"), contents(f"{path}/first"))
        with torch.no_grad():
            assert close(model.eval()(input_ids=ids).logits, reference.eval()(input_ids=ids).logits), name


class Buffered(nn.Module):
    """A buffer that no checkpoint has."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = stacked()
        self.register_buffer("scale", torch.ones(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def misfits(ranks: Ranks) -> None:
    """Refused with the names, on all ranks, before anything is read or changed."""
    path = shared_directory(ranks)
    whole = {n: t.contiguous() for n, t in mixtral("eager").state_dict().items()}
    experts = {n: t for n, t in whole.items() if "experts" in n}
    apart = {n: t for n, t in whole.items() if n not in experts}
    for name, tensor in experts.items():
        start = name.rpartition(".")[0]
        for e in range(checks.E):
            parts = {"w1": tensor[e].chunk(2)[0], "w3": tensor[e].chunk(2)[1]} if "gate" in name else {"w2": tensor[e]}
            apart |= {f"{start}.{e}.{w}.weight": t.clone() for w, t in parts.items()}
    model = meta(functools.partial(mixtral, "eager"))
    w2, last, norm = "model.layers.0.mlp.experts.{}.w2.weight", checks.E - 1, "model.norm.weight"
    stack = "model.layers.0.mlp.experts.down_proj"
    without = {n: t for n, t in apart.items() if n != w2.format(last)}

    def turned(names: dict[str, Tensor]) -> dict[str, Tensor]:
        return {w2.format(last + 1) if n == w2.format(last) else n: t for n, t in names.items()}

    cases: dict[str, dict[str, Tensor]] = {
        f"missing: {norm}": {n: t for n, t in whole.items() if n != norm},
        "unexpected: more": whole | {"more": torch.zeros(1)},
        f"wrong: {norm} is (3,), and (16,) here": whole | {norm: torch.zeros(3)},
        f"wrong: {stack} is ({last}, 16, 24), and ({last + 1}, 16, 24) here": without,
        f"and the checkpoint {last + 1} tensors such as": turned(apart),
        f"{norm} is torch.int8, and {norm} torch.float32": whole | {norm: torch.zeros(16, dtype=torch.int8)},
        f"{norm} is torch.float8_e4m3fn": whole | {norm: torch.zeros(16).to(torch.float8_e4m3fn)},
        f"{stack} is made of": apart | {stack: whole[stack]},
    }
    for i, (text, tensors) in enumerate(cases.items()):
        if not ranks.rank:
            save_file(tensors, f"{path}/{i}.safetensors")
        dist.barrier()
        with bytes_read() as counted:
            said = refusal(functools.partial(moe_compile.load_safetensors, model, f"{path}/{i}.safetensors"))
        assert text in said and not counted, said
        assert all(p.device.type == "meta" for p in model.parameters())
    for name in ("", "/nowhere.safetensors", "/broken.safetensors", "/index.json"):
        if not ranks.rank:
            save_file({"a": torch.zeros(4)}, f"{path}/there.safetensors")
            with open(f"{path}/there.safetensors", "rb") as file, open(f"{path}/broken.safetensors", "wb") as part:
                part.write(file.read()[:-3])
            with open(f"{path}/index.json", "w") as file:
                json.dump({"weight_map": {"a": "there.safetensors", "b": "there.safetensors"}}, file)
        dist.barrier()
        said = refusal(functools.partial(moe_compile.load_safetensors, model, path + name))
        assert any(t in said for t in ("there is no", "cannot be read", "names what no file has: b")), said
    assert "is on meta" in refusal(functools.partial(moe_compile.save_safetensors, model, f"{path}/x"))
    tied = meta(functools.partial(mixtral, "eager", tie_word_embeddings=True))
    if not ranks.rank:
        with open(f"{path}/list.json", "w") as file:
            json.dump([], file)
        save_file(whole | {"lm_head.weight": torch.ones(32, 16)}, f"{path}/untied.safetensors")
    dist.barrier()
    said = refusal(functools.partial(moe_compile.load_safetensors, tied, f"{path}/untied.safetensors"))
    assert "is another tensor in" in said, said
    said = refusal(functools.partial(moe_compile.load_safetensors, tied, f"{path}/list.json"))
    assert "list.json is no index" in said, said
    buffered = meta(Buffered)
    if not ranks.rank:
        save_file(dict(Buffered().state_dict()), f"{path}/buffered.safetensors")
    dist.barrier()
    said = refusal(functools.partial(moe_compile.load_safetensors, buffered, f"{path}/buffered.safetensors"))
    assert "on meta, and in no checkpoint: scale" in said, said
    buffered.scale = torch.ones(3)
    moe_compile.load_safetensors(buffered, f"{path}/buffered.safetensors")
    assert "is not of parallelize" in refusal(functools.partial(moe_compile.save_safetensors, stacked(), f"{path}/y"))


CHECKS = {2: [from_transformers, of_other_models, misfits, families], 4: [from_transformers, of_other_models]}
