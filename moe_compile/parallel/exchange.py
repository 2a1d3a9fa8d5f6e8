"""What stands between the collectives of a placed region: plain functions that Dynamo traces.

Letters    T tokens, R = T*K rows of this rank, S rows that it received, P ranks, L experts of a rank, M the most that a
           rank has.
Message    What a rank tells each other about the rows to come: [P, M + 2], one line a rank.  M counts, one an expert;
           then how many rows no expert takes: they travel with those of the last rank, behind which they are sorted,
           and come back as zeros; then a fingerprint of what its experts compute and by which strategy, which has to be
           the same everywhere.  All strategies that move tokens begin with a message of this shape, so that ranks
           which disagree hear of it.  Of several chunks it is that of the first: a second one has the lines of the
           others, and is sent when it is known that all ranks have as many.
"""

import hashlib

import torch
from torch import Tensor
from torch.library import custom_op


def fingerprint(text: str) -> int:
    """A number of 31 bits for what experts compute."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little") >> 1


def message(offsets_E: Tensor, rows_RD: Tensor, ranks: int, most: int, mark: int) -> Tensor:
    """What this rank tells the others, flat: [P * (M + 2)]."""
    counts_E = torch.diff(offsets_E, prepend=offsets_E.new_zeros(1))
    counts_PM = torch.nn.functional.pad(counts_E, (0, ranks * most - counts_E.shape[0])).view(ranks, most)
    nobody_P1 = torch.nn.functional.pad(rows_RD.shape[0] - offsets_E[-1:], (ranks - 1, 0)).view(ranks, 1)
    return torch.cat([counts_PM, nobody_P1, torch.full_like(nobody_P1, mark)], 1).reshape(-1)


def rank_message(offsets_P: Tensor, most: int, mark: int) -> Tensor:
    """The same, with the number of rows for each rank in the place of the first count: one row may be for several."""
    counts_P = torch.diff(offsets_P, prepend=offsets_P.new_zeros(1))
    return _lines(counts_P, most, mark)


def equal_message(ids_TK: Tensor, ranks: int, most: int, mark: int) -> Tensor:
    """The same, with the number of tokens of this rank in the place of the first count."""
    # counted, not filled in: a size that becomes a value of a tensor would be a constant of the graph
    number = ids_TK.new_ones(ids_TK.shape[0], dtype=torch.int32).sum(dtype=torch.int32)
    return _lines(number.expand(ranks), most, mark)


def _lines(first_P: Tensor, most: int, mark: int) -> Tensor:
    lines = torch.nn.functional.pad(first_P.unsqueeze(1), (0, most))
    return torch.nn.functional.pad(lines, (0, 1), value=mark).reshape(-1)


def host_read(sent: Tensor, received: Tensor, rows_RD: Tensor | None, ranks: int) -> tuple[list[int], list[int]]:
    """(rows to each rank, rows from each): the one read of data by the host.  All of `rows_RD` travel, if given."""
    send, receive = host_reads([sent], [received], [rows_RD], ranks)
    return send, receive


def host_reads(sent: list[Tensor], received: list[Tensor], rows: list[Tensor | None], ranks: int) -> list[list[int]]:
    """What `host_read` says for each of several chunks, one after the other, with one read: to each rank, from each."""
    chunks = len(rows)
    lines = torch.cat([*sent, *received]).to("cpu")
    numbers: list[int] = torch.ops.moe_ep.check_messages(lines, ranks, chunks).tolist()
    for n in numbers:
        torch._check(n >= 0)
    found = []
    for i, x in enumerate(rows):
        send, receive = (numbers[j * ranks : (j + 1) * ranks] for j in (i, chunks + i))
        all_sent = send[-1] if x is None else x.shape[0]
        found += [_with_last(send, all_sent), _with_last(receive, receive[-1])]
    return found


def _with_last(numbers: list[int], total: int) -> list[int]:
    """All but the last, and what it is.  So their sum is one symbol, and no sum of as many as there are ranks: to
    reason about those takes the compiler the square of the time."""
    first = numbers[:-1]
    return [*first, total - sum(first)]


def joined_messages(messages: list[Tensor], ranks: int) -> Tensor:
    """The messages of several chunks as one: [P, chunks, M + 2], flat."""
    return torch.stack([m.view(ranks, -1) for m in messages], 1).reshape(-1)


def message_of(joined: Tensor, index: int, chunks: int, ranks: int) -> Tensor:
    """The message of one chunk again."""
    return joined.view(ranks, chunks, -1)[:, index].reshape(-1)


@custom_op("moe_ep::of_same_experts", mutates_args=())
def of_same_experts(rows: Tensor, received: Tensor, sent: Tensor, ranks: int) -> Tensor:
    """A copy of `rows`, for a collective whose size depends on the number of chunks; an error on all ranks, before it
    begins, if the messages say that they compute something else or in other chunks.

    On an accelerator the check runs there, and fails at the next synchronisation: the host reads nothing.
    """
    marks, mark = received.view(ranks, -1)[:, -1], sent[-1]
    if rows.device.type != "cpu":
        torch._assert_async((marks == mark).all())
    else:
        _same_experts(marks, mark)
    return rows.clone()


@of_same_experts.register_fake
def _(rows: Tensor, received: Tensor, sent: Tensor, ranks: int) -> Tensor:
    return torch.empty_like(rows)


def token_chunks(rows: Tensor, chunks: int) -> list[Tensor]:
    """Rows [T, ...] in parts whose sizes differ by one at most; some are empty where there are fewer rows."""
    ends = [i * rows.shape[0] // chunks for i in range(chunks + 1)]
    return list(torch.split(rows, [ends[i + 1] - ends[i] for i in range(chunks)]))


@custom_op("moe_ep::check_messages", mutates_args=())
def check_messages(messages: Tensor, ranks: int, chunks: int = 1) -> Tensor:
    """[2 * chunks * P]: rows to each rank, chunk by chunk, then from each; in the place of the last rank, the sum of
    all.  A line of a rank whose experts compute something else is an error."""
    lines = messages.view(2 * chunks * ranks, -1)
    _same_experts(lines[chunks * ranks :, -1].view(chunks, ranks), lines[0, -1])
    rows = lines[:, :-1].sum(1).view(2 * chunks, ranks)
    rows[:, -1] = rows.sum(1)
    return rows.view(-1)


def _same_experts(marks: Tensor, mark: Tensor) -> None:
    """Raise if the marks [..., P] of other ranks are not that of this one."""
    differ = (marks != mark).reshape(-1, marks.shape[-1]).any(0).nonzero().flatten().tolist()
    if differ:
        raise RuntimeError(
            f"experts compute something else on ranks {differ} of the expert-parallel group than on this one: their "
            f"graphs were made for other modes, dtypes, strategies, numbers of chunks or batch sizes that the experts "
            f"read"
        )


@check_messages.register_fake
def _(messages: Tensor, ranks: int, chunks: int = 1) -> Tensor:
    return messages.new_empty(2 * chunks * ranks, dtype=torch.int64)


def expert_of_row(received: Tensor, rows_SD: Tensor, ranks: int) -> Tensor:
    """[S, 1]: the expert of this rank that each received row is for; one that it has not, for rows of nobody."""
    counts = received.view(ranks, -1)[:, :-1]
    expert = torch.arange(counts.shape[1], device=received.device).repeat(ranks)
    return torch.repeat_interleave(expert, counts.reshape(-1), output_size=rows_SD.shape[0]).unsqueeze(1)


# -- where all ranks have equally many tokens -----------------------------------------------


@custom_op("moe_ep::of_equal_sizes", mutates_args=())
def of_equal_sizes(rows: Tensor, sent: Tensor, received: Tensor, ranks: int) -> Tensor:
    """A copy of `rows`, for a collective that needs equally many from each rank; an error if the messages say that
    ranks have batches of several sizes, or experts that compute something else.

    On an accelerator the check runs there, before the collective, and fails at the next synchronisation: the host
    reads nothing.
    """
    mine, lines = sent.view(ranks, -1)[0], received.view(ranks, -1)
    if rows.device.type != "cpu":
        torch._assert_async((lines == mine).all())
    else:
        _same_experts(lines[:, -1], mine[-1])
        if (lines[:, 0] != mine[0]).any():
            raise RuntimeError(
                f"ranks of the expert-parallel group have {', '.join(map(str, lines[:, 0].tolist()))} tokens: strategy "
                f"'allgather' needs batches of one size; 'alltoall' and 'gather_weights' take any"
            )
    return rows.clone(memory_format=torch.contiguous_format)


@of_equal_sizes.register_fake
def _(rows: Tensor, sent: Tensor, received: Tensor, ranks: int) -> Tensor:
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


of_equal_sizes.register_autograd(lambda ctx, gradient: (gradient, None, None, None))


# -- where a token travels once to a rank ---------------------------------------------------


def on_the_wire(ids_TK: Tensor, num_experts: int) -> Tensor:
    """Ids as they travel, in 32 bits; -1 for those of no expert."""
    return torch.where((ids_TK >= 0) & (ids_TK < num_experts), ids_TK, -1).to(torch.int32)


def distinct_ranks(ids_TK: Tensor, most: int) -> Tensor:
    """[T, K]: the rank of each id, -1 where a slot before it has the same, and for nobody."""
    rank_TK = torch.div(ids_TK, most, rounding_mode="floor")
    same_TKK = rank_TK.unsqueeze(2) == rank_TK.unsqueeze(1)
    return torch.where(same_TKK.tril(-1).any(2), -1, rank_TK)


@custom_op("moe_ep::fit_rows", mutates_args=())
def fit_rows(rows: Tensor, number: int) -> Tensor:
    """[number, ...]: the first rows, and zeros behind them where there are fewer."""
    out = rows.new_zeros(number, *rows.shape[1:])
    some = min(number, rows.shape[0])
    out[:some] = rows[:some]
    return out


@fit_rows.register_fake
def _(rows: Tensor, number: int) -> Tensor:
    return rows.new_empty(number, *rows.shape[1:])


def _fit_save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.number = inputs[0].shape[0]


fit_rows.register_autograd(lambda ctx, gradient: (fit_rows(gradient, ctx.number), None), setup_context=_fit_save)


def prefix(rows: Tensor, splits: list[int]) -> Tensor:
    """As many of the first rows as travel: behind them are those that do not."""
    return torch.ops.moe_ep.fit_rows(rows, sum(splits))


def padded(rows_ND: Tensor, order_R: Tensor) -> Tensor:
    """[R, D]: zeros behind the rows."""
    return torch.ops.moe_ep.fit_rows(rows_ND, order_R.shape[0])
