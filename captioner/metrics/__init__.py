"""Caption scores by coco-caption's definitions, and figures that n-gram scores do not show.

Scores are fractions as there (CIDEr-D 0…10); ×100 gives the figures of the literature.
"""

from captioner.metrics.bootstrap import paired_bootstrap
from captioner.metrics.diversity import Diversity, diversity
from captioner.metrics.java import MissingToolError, meteor, need_meteor, need_spice, spice
from captioner.metrics.ngrams import References, Scores, score
from captioner.metrics.treebank import tokenize as ptb_tokenize

__all__ = [
    "Diversity",
    "MissingToolError",
    "References",
    "Scores",
    "diversity",
    "meteor",
    "need_meteor",
    "need_spice",
    "paired_bootstrap",
    "ptb_tokenize",
    "score",
    "spice",
]
