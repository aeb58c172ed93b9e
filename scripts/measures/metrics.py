"""The scores' speed, beside pycocoevalcap's."""

from __future__ import annotations

import argparse
import random

from captioner.metrics import References
from measures.timing import Named, in_turn, ratio


def made_captions(images: int, each: int, seed: int) -> list[list[list[str]]]:
    """Make up captions of 7 to 15 words, as frequent as words are (Zipf), of 5,000 words."""
    draw = random.Random(seed)
    words = [f"w{n}" for n in range(5000)]
    weights = [1.0 / (n + 3) for n in range(5000)]
    return [
        [draw.choices(words, weights, k=draw.randint(7, 15)) for _ in range(each)]
        for _ in range(images)
    ]


def metrics(args: argparse.Namespace) -> Named:
    """CIDEr-D, BLEU and ROUGE-L of 5,000 images; CIDEr-D as a reward, 160 candidates at a time."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    wanted = made_captions(args.images, 5, seed=1)
    written = [each[0] for each in made_captions(args.images, 1, seed=2)]
    theirs = (
        {i: [" ".join(words) for words in each] for i, each in enumerate(wanted)},
        {i: [" ".join(words)] for i, words in enumerate(written)},
    )
    prepared = References(wanted)

    def reward() -> None:
        for start in range(0, args.images, 160):
            chunk = written[start : start + 160]
            prepared.cider_d(chunk, range(start, start + len(chunk)))

    def all_three() -> None:
        Bleu(4).compute_score(*theirs, verbose=0)
        Rouge().compute_score(*theirs)
        Cider().compute_score(*theirs)

    def ours() -> None:
        References(wanted).score(written)

    def theirs_reward() -> None:
        Cider().compute_score(*theirs)

    taken = in_turn({"theirs": all_three, "ours": ours}, args.rounds)
    yield "pycocoevalcap / ours", {"ratio": ratio(taken["theirs"], taken["ours"])}
    taken = in_turn({"theirs": theirs_reward, "ours": reward}, args.rounds)
    yield "Cider / reward", {"ratio": ratio(taken["theirs"], taken["ours"])}
