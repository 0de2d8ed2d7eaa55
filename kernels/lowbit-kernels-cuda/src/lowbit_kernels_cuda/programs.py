"""Which rows of a weight and which tokens a program multiplies; shared by kernels in Triton and in Gluon."""

# What a constexpr holds is known to Triton alone.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportIndexIssue=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl


def blocks_of_tokens(m: int, tokens: int, experts: int) -> int:
    """How many blocks of tokens programs are for; of experts at most, whoever's they are (see `program_of`)."""
    return min(m, m // tokens + experts + 1) if experts else triton.cdiv(m, tokens)


@triton.jit
def program_of(
    program,
    index,
    offs,
    m,
    n,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BAND: tl.constexpr,
):
    """A block of rows, its expert, and the first token, the one after the last of the expert's, and that to write.

    Programs go down BAND blocks of rows, then along tokens. With EXPERTS, `offs` ends the tokens of each; tokens beyond
    the last are written, but nobody's. `index` counts on from 0, beyond EXPERTS. Only the GPU knows how many tokens an
    expert has, so blocks are numbered by what is known of them: by their first token, if tokens are few, else those of
    expert e from start // TOKENS + e on, which leaves room for those of the experts before. The first token of what
    is then no block is not before its last.
    """
    FEW = m <= m // TOKENS + EXPERTS + 1
    tokens_of = tl.cdiv(m, TOKENS) if EXPERTS == 0 else tl.minimum(m, m // TOKENS + EXPERTS + 1)
    down = BAND * tokens_of
    band = program // down * BAND
    tall = tl.minimum(tl.cdiv(n, ROWS) - band, BAND)
    row, block = band + program % down % tall, program % down // tall
    if EXPERTS == 0:
        # The last block begins early rather than reach beyond the end, which takes longer: its first tokens, which the
        # one before has too, become the same bits.
        expert, first, routed, end = 0, tl.maximum(tl.minimum(block * TOKENS, m - TOKENS), 0), m, m
    else:
        ends = tl.minimum(tl.load(offs + index, index < EXPERTS, m), m)
        starts = tl.minimum(tl.load(offs + index - 1, (index > 0) & (index <= EXPERTS), 0), m)
        before = ends <= block if FEW else (index > 0) & (index <= EXPERTS) & (starts // TOKENS + index <= block)
        expert = tl.sum(before.to(tl.int32))
        start = tl.sum(tl.where(index == expert, starts, 0))
        end = tl.sum(tl.where(index == expert, ends, 0))
        if FEW:
            first = block
            end = tl.where((block - start) % TOKENS == 0, end, first)
        else:
            first = start + (block - start // TOKENS - expert) * TOKENS
        routed = tl.where(expert < EXPERTS, end, 0)
        expert = tl.minimum(expert, EXPERTS - 1)
    return row, expert, first, routed, end
