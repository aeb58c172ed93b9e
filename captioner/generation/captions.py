"""From a grid to captions: words for tokens, and rules for what may be written."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from captioner.data.tokenizer import detokenize
from captioner.data.vocabulary import BOS, EOS, PAD, SPECIAL, UNK, UNSAID, Vocabulary
from captioner.generation.beams import Hypothesis
from captioner.generation.description import Caption, NotFiniteError
from captioner.generation.options import SearchOptions
from captioner.generation.rules import Forbid, NoEnding, TokenRule
from captioner.generation.search import search
from captioner.model.decoder import Decoder, DecoderState
from captioner.settings import ConfigError

__all__ = [
    "retrace",
    "search_tokens",
    "token_rules",
    "write_captions",
]


def token_rules(
    options: SearchOptions, vocabulary: Vocabulary
) -> tuple[list[TokenRule], list[int]]:
    """Return what the words of the options mean for tokens: rules, and the required ids.

    Raises ``ConfigError`` for a word that the vocabulary does not have.
    """
    never = [token for token in UNSAID if not (options.unknown and token == UNK)]
    rules: list[TokenRule] = [Forbid([*never, *_tokens(options, "forbidden", vocabulary)])]
    if options.no_ending:
        no_ending = _tokens(options, "no_ending", vocabulary)
        rules.append(NoEnding(no_ending, options.max_words))
    return rules, _tokens(options, "required", vocabulary)


def _tokens(options: SearchOptions, name: str, vocabulary: Vocabulary) -> list[int]:
    words: tuple[str, ...] = getattr(options, name)
    strange = [word for word in words if word in SPECIAL or word not in vocabulary]
    if strange:
        shown = ", ".join(map(repr, strange))
        raise ConfigError(f"{name} has {shown}: the model does not know such a word")
    return vocabulary.encode(words)[:-1]


def write_captions(
    decoders: Sequence[Decoder],
    vocabulary: Vocabulary,
    grids: Sequence[Tensor],
    options: SearchOptions,
    attention: bool = False,
    check_finite: bool = True,
) -> list[list[Caption]]:
    """Return the captions of each image, best first.

    ``grids`` has a grid ``(B, N, D)`` for each decoder; several are an ensemble, whose
    log-probability is the mean of theirs. Raises ``ConfigError`` for words of the options that
    the vocabulary does not have, and, with ``check_finite``, ``NotFiniteError`` for a model that
    computes NaN. A training run that diverges is validated without that check.
    """
    rules, required = token_rules(options, vocabulary)
    found = search_tokens(decoders, grids, None, options, rules, required, check_finite)
    looked = _attention(decoders, grids, found) if attention else [[None] * len(f) for f in found]
    return [
        [_caption(h, vocabulary, weights) for h, weights in zip(*image, strict=True)]
        for image in zip(found, looked, strict=True)
    ]


def _caption(
    hypothesis: Hypothesis,
    vocabulary: Vocabulary,
    attention: np.ndarray[Any, np.dtype[np.float32]] | None,
) -> Caption:
    words = tuple(vocabulary.decode(hypothesis.tokens))
    return Caption(
        detokenize(words),
        hypothesis.log_prob,
        words,
        hypothesis.token_log_probs[: len(words)],
        hypothesis.finished,
        attention=attention,
    )


class _States(NamedTuple):
    """The states of an ensemble's decoders between two steps."""

    members: tuple[DecoderState, ...]

    @classmethod
    def start(cls, decoders: Sequence[Decoder], grids: Sequence[Tensor]) -> _States:
        return cls(tuple(d.start(grid) for d, grid in zip(decoders, grids, strict=True)))

    def select(self, rows: Tensor) -> _States:
        return _States(tuple(member.select(rows) for member in self.members))


def _step(
    decoders: Sequence[Decoder], tokens: Tensor, states: _States, adjustment: Tensor | None = None
) -> tuple[Tensor, list[Tensor], _States]:
    """Return the mean log-probabilities ``(R, V)``, each member's weights, and the states."""
    stepped = [d.step(tokens, s) for d, s in zip(decoders, states.members, strict=True)]
    logits, weights, members = zip(*stepped, strict=True)
    each = [
        torch.log_softmax(x if adjustment is None else x + adjustment, dim=-1, dtype=torch.float32)
        for x in logits
    ]
    mean = each[0] if len(each) == 1 else torch.stack(each).mean(dim=0)
    return mean, list(weights), _States(members)


@torch.inference_mode()
def search_tokens(
    decoders: Sequence[Decoder],
    grids: Sequence[Tensor],
    adjustment: Tensor | None,
    options: SearchOptions,
    rules: Sequence[TokenRule],
    required: Sequence[int] = (),
    check_finite: bool = True,
) -> list[list[Hypothesis]]:
    """Return the hypotheses of each image, best first.

    Args:
        decoders: The decoders whose log-probabilities are averaged.
        grids: A grid ``(B, N, D)`` for each.
        adjustment: ``(V,)``, added to the logits at each step.
        options: How to search.
        rules: What may be written.
        required: The ids that every hypothesis has.
        check_finite: Whether a model that computes NaN is refused.

    Raises:
        NotFiniteError: The model computes NaN.
    """
    is_nan: list[Tensor] = []

    def step(tokens: Tensor, state: _States) -> tuple[Tensor, _States]:
        log_probs, _, state = _step(decoders, tokens, state, adjustment)
        # A softmax with a NaN among its logits is NaN everywhere. Rules write into it afterwards.
        is_nan.append(log_probs[:, 0].isnan())
        return log_probs, state

    first = torch.full((len(grids[0]),), BOS, device=grids[0].device)
    found = search(step, first, _States.start(decoders, grids), options, rules, required)
    # Checked once, as each look at a value waits for the device.
    if check_finite and is_nan and torch.cat(is_nan).any():
        raise NotFiniteError
    return found


@torch.inference_mode()
def retrace(
    decoders: Sequence[Decoder],
    grids: Sequence[Tensor],
    hypotheses: Sequence[Sequence[Hypothesis]],
) -> tuple[Tensor, list[Tensor]]:
    """Return what the decoders say of hypotheses already found, in one teacher-forced pass.

    For R = B·K rows, K the most hypotheses of an image (where it has fewer, its first stands in),
    and L the most tokens: the log-probability of each token and of EOS, ``(R, L + 1)``, 0 after
    EOS; and each decoder's attention weights ``(R, L + 1, N)``. No step's logits are kept.
    """
    device, most = grids[0].device, max(map(len, hypotheses))
    rows = [[*found, *[found[0]] * (most - len(found))] for found in hypotheses]
    written = [torch.tensor([*h.tokens, EOS]) for image in rows for h in image]
    targets = torch.nn.utils.rnn.pad_sequence(written, True, PAD).to(device)
    images = torch.arange(len(rows), device=device)[:, None].expand(-1, most)
    states = _States.start(decoders, grids).select(images)
    tokens = torch.full_like(targets[:, 0], BOS)
    terms, looked = [], []
    for token in targets.unbind(dim=1):
        log_probs, weights, states = _step(decoders, tokens, states)
        terms.append(log_probs.gather(1, token[:, None])[:, 0].masked_fill(token == PAD, 0.0))
        looked.append(weights)
        tokens = token
    return torch.stack(terms, dim=1), [torch.stack(w, dim=1) for w in zip(*looked, strict=True)]


def _attention(
    decoders: Sequence[Decoder],
    grids: Sequence[Tensor],
    hypotheses: Sequence[Sequence[Hypothesis]],
) -> list[list[Any]]:
    """Return the weights ``(L, N)`` of each hypothesis, the mean of the decoders that attend."""
    sizes = {grid.shape[1] for grid in grids}
    if len(sizes) > 1:
        shown = " and ".join(map(str, sorted(sizes)))
        raise ConfigError(f"the models see grids of {shown} cells, which have no common attention")
    attends = [decoder.attention is not None for decoder in decoders]
    if not any(attends) or not hypotheses:
        return [[None] * len(found) for found in hypotheses]
    _, looked = retrace(decoders, grids, hypotheses)
    attending = [weights.float() for weights in compress(looked, attends)]
    mean = torch.stack(attending).mean(dim=0).cpu().numpy()
    most = len(mean) // len(hypotheses)
    return [
        [mean[most * image + place, : len(h.tokens)] for place, h in enumerate(found)]
        for image, found in enumerate(hypotheses)
    ]
