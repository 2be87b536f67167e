"""Why the simulation disagrees with a published shape, where it does: looked for in the runs, and found there."""

from __future__ import annotations

from collections.abc import Sequence

from experiments import AS_IS
from shapes import Shape

THRASH = (
    "Pools of less than 100 blocks: 0.4.2's watermark is 1 % of the blocks, cut to a whole number, so here 0; and "
    "every decoding request must find a free block, also where its last one has room (the defect `spare-block`). A "
    "victim is then admitted again at once, computed again, and preempted again when the other next decodes: once a "
    "token, until one of them has filled its last block, so up to a block's tokens in number. Swapping does not "
    "thrash: to return, a swapped request must find its blocks and one more. With the defect mended the shape "
    "holds, and it holds at the block sizes that 0.4.2 has kernels for (8, 16, 32). The published memory was not "
    "told; with 100 blocks or more the watermark is 1, and this does not happen."
)
EARLY = (
    "What the copies take falls as published, but the overhead is not made of copies: most of it is that the victim "
    "waits until the other request ends. By `spare-block` the last free block is asked for up to a block too early, "
    "so the larger the blocks, the earlier the overflow and the longer the wait: by up to 256 tokens of 12 ms, "
    "where the copies of a victim take 0.1 s. With the defect mended the overflow comes at the same token, and the "
    "shape holds."
)
PAGEABLE = (
    "Pageable memory is assumed to carry 10 of 25 GB/s. A token's way out and in is 1 MiB and 8 copies, 153 us at a "
    "block size of 16, and its recomputation 69 us and 2 ns for each token before it: the two meet at 40,000 "
    "tokens, which is the whole memory. 0.4.2 pins its CPU blocks; what was published may well be pinned "
    "throughout."
)
PACKING = (
    "How often requests of one length overflow depends on how they pack into the memory: nine victims at 6,144 "
    "tokens, six at 8,192, eight at 10,240. More tokens a victim, but fewer victims. The overhead itself, nearly "
    "all of it waiting, rises throughout."
)
LOWEST = (
    "From 46 % of the memory on, more memory lets no more requests run at once, but moves the moments of overflow: "
    "all overheads there are within 3 % of each other, and which of them is the lowest is a matter of how requests "
    "pack. Of whole tenths, 50 % is the lowest, as was published for one of the two ways. That the other should be "
    "lowest at 30 %, the simulation does not show."
)
LOWEST_PART = (
    "What overflows themselves take depends on how requests pack more than on how much memory there is: at 9 % four "
    "prompts are admitted, and few requests overflow; they wait instead, and the overhead there is one of the "
    "highest."
)
MIRROR = (
    "What goes out of the one comes into the other, and back, so that changes mirror each other; levels do not. "
    "Requests that run grow into free blocks, and waiting ones are admitted as soon as nobody is swapped: the GPU "
    "is about as full with requests on the CPU as without. Perhaps the published engine had requests swapped for "
    "longer, with fewer that wait."
)
CHANCE = "The spikes come too irregularly at these costs: calls of prefill and decode take other shares of a round."
#: (figure, engine or "" for any, how the claim begins, "total" or "part" or "" for either, why)
KNOWN = (
    ("2a", AS_IS, "recompute flat", "", THRASH),
    ("2a", AS_IS, "swap falls", "total", EARLY),
    ("2a", AS_IS, "pageable swap falls", "total", EARLY),
    ("2b", AS_IS, "recompute rises", "", THRASH),
    ("2b", "", "pageable swap below", "", PAGEABLE),
    ("3a", "", "pageable swap below", "", PAGEABLE),
    ("3a", "", "", "part", PACKING),
    ("3b", "", "recompute lowest", "total", LOWEST),
    ("3b", "", "swap lowest", "total", LOWEST),
    ("3b", "", "pageable swap lowest", "total", LOWEST),
    ("3b", "", "", "part", LOWEST_PART),
    ("4", "", "swap: CPU occupancy mirrors", "", MIRROR),
    ("4", "", "", "", CHANCE),
)


def why(shape: Shape, which: str) -> str:
    """The reason why `shape` does not hold in its "total" or its "part"."""
    for figure, engine, begins, of, reason in KNOWN:
        if (
            shape.figure == figure
            and engine in ("", shape.engine)
            and shape.claim.startswith(begins)
            and of in ("", which)
        ):
            return reason
    return "Not known."


def disagreements(shapes: Sequence[Shape]) -> dict[str, list[str]]:
    """The shapes that do not hold, by reason, in the order of the figures."""
    found: dict[str, list[str]] = {}
    for shape in shapes:
        for which, answer in (("total", shape.total), ("part", shape.part)):
            if answer is not None and not answer.holds:
                of = "" if which == "total" else " (overflows alone)"
                found.setdefault(why(shape, which), []).append(f"{shape.figure} {shape.claim}{of}")
    return found
