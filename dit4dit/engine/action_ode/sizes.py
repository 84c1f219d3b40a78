"""What tiles take: of a block's shared memory, and of a warp's registers."""

from __future__ import annotations

from dit4dit.engine.action_ode.schedule import (
    MAX_WARP_TILES,
    MOST_TOKENS_OF_TWO,
    SLOT_BYTES,
    WARP_KEYS,
    WARPS,
    MatrixPlan,
    Product,
)


def warp_tiles(padded_tokens: int) -> int:
    """Row groups of 16 that one warp may have of a product: what its registers hold."""
    return MAX_WARP_TILES if padded_tokens <= MOST_TOKENS_OF_TWO else 1


def query_rows(tokens: int) -> int:
    """Queries of one sample, padded to whole warps' rows of 16: 1, 2 or 4 of them."""
    return 16 if tokens <= 16 else 32 if tokens <= 32 else 64


def warp_keys(tokens: int, keys: int, head_dim: int, features: bool) -> int:
    """Keys that one warp takes at a time, of `keys` that its rank has: of the tokens all that are its, of features no more than
    half a slot holds with as many values.
    """
    groups = WARPS * 16 // query_rows(tokens)
    per_warp = min(WARP_KEYS, -(-keys // (groups * 16)) * 16)
    return per_warp - 16 if features and 2 * per_warp * row_bytes(head_dim) > SLOT_BYTES else per_warp


def row_bytes(head_dim: int) -> int:
    """From row to row of a head's queries, keys or values in shared memory: 16 apart from a multiple of the banks."""
    return 2 * head_dim + 16


def attend_bytes(tokens: int, keys: int, head_dim: int, features: bool) -> int:
    """Staging of an attention tile of so many keys a rank: queries, of the tokens also keys and values, then what warps found."""
    rows = query_rows(tokens)
    if not features:
        rows += 2 * WARPS * 16 // rows * warp_keys(tokens, keys, head_dim, features)
    return max(rows * row_bytes(head_dim), WARPS * 16 * (2 + head_dim) * 4)


def panel_bytes(tokens: int, slice_: int, head_dim: int, keys: int) -> int:
    """Keys and values of the features that a rank with `keys` of them fetches, filled up to what a warp takes."""
    each = warp_keys(tokens, slice_, head_dim, True)
    return -(-keys // each) * each * 2 * 2 * head_dim


def attend_inbox(tokens: int, share: int, head_dim: int) -> int:
    """Inbox of an attention tile: of each rank that has some of the keys a part of its sums over values, and largest score and
    sum of each query; nothing where one rank has them all.
    """
    return share * tokens * (head_dim // share * 4 + 8) if share > 1 else 0


def product_staging(padded_tokens: int, part: int, matrix: MatrixPlan, attention: int = 0) -> int:
    """Staging of a product: `part` columns of tokens, and behind them `attention` bytes for what they are worked out from and
    then, in a team of one, the sums of its warps.

    Columns lie in groups of 8, each 16 bytes a token, and 16 more so that neighbours start in another bank.
    """
    staged = part // 8 * (16 * padded_tokens + 16)
    return staged + max(attention, sums_bytes(padded_tokens, matrix) if matrix.ranks == 1 else 0)


def own_attention_bytes(tokens: int, head_dim: int) -> int:
    """Staging of one head of one sample whose attention is part of a product: queries, keys and values, `tokens` of each."""
    return 3 * query_rows(tokens) * row_bytes(head_dim)


def own_at_once(m: MatrixPlan, tokens: int, samples: int, head_dim: int) -> int:
    """How many of them a block works out at once: one row of 16 queries for each of its warps."""
    return min(samples * own_heads(m, head_dim), WARPS * 16 // query_rows(tokens))


def own_heads(m: Product | MatrixPlan, head_dim: int) -> int:
    """Heads to which a block's columns belong, of the block with most of them, where a product's rows are attention's results."""
    firsts = range(0, m.columns, m.slice)
    return max((min(first + m.slice, m.columns) - 1) // head_dim - first // head_dim + 1 for first in firsts)


def sums_bytes(padded_tokens: int, matrix: MatrixPlan) -> int:
    """All planes of the rows that a rank finishes, [planes, own rows, padded tokens + 2] floats, and before them mean and squares
    of each token from each rank of the split.
    """
    return matrix.split * padded_tokens * 8 + matrix.planes * matrix.own_rows * (padded_tokens + 2) * 4
