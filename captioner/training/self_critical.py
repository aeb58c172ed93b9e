"""Self-critical sequence training: captions are sampled, rewarded, and made likelier or less so.

The loss is that of Rennie et al., "Self-critical sequence training for image captioning" (2017),
equation 8. The baseline is that of Luo, "A better variant of self-critical sequence training"
(2020).
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor, nn

from captioner.config import SelfCriticalConfig
from captioner.data.dataset import Batch
from captioner.data.example import Example
from captioner.data.tokenizer import detokenize
from captioner.data.vocabulary import BOS, EOS, PAD, UNSAID, Vocabulary
from captioner.generation.options import SearchOptions
from captioner.generation.rules import Forbid
from captioner.generation.search import draw_noise, search
from captioner.metrics import References, ptb_tokenize
from captioner.model.decoder import Decoder, DecoderState
from captioner.model.device import autocast
from captioner.model.model import CaptionModel
from captioner.training.losses import no_loss

__all__ = [
    "Reward",
    "SelfCritical",
    "advantages",
    "draw",
    "policy_gradient_loss",
    "policy_log_probs",
]

_END = "</s>"  # no token of a caption


class Reward:
    """CIDEr-D of captions mixed with a share of BLEU-4, the end of the sentence being a last word.

    Without the end among the words, captions learn to break off ("a man in a"). Document
    frequencies are those of the training captions.
    """

    def __init__(
        self, examples: Sequence[Example], vocabulary: Vocabulary, bleu_weight: float
    ) -> None:
        """Count the captions of the training examples."""
        words = iter(ptb_tokenize([caption for e in examples for caption in e.captions]))
        self._references = References(
            [[[*next(words), _END] for _ in e.captions] for e in examples]
        )
        self._vocabulary, self._bleu_weight = vocabulary, bleu_weight

    def __call__(self, captions: Sequence[Sequence[int]], images: Sequence[int]) -> Tensor:
        """Return the rewards ``(R,)`` of captions, given as token ids without BOS and EOS.

        ``images`` has the index of each caption's photograph in the training data.
        """
        texts = [detokenize(self._vocabulary.decode(tokens)) for tokens in captions]
        words = [[*found, _END] for found in ptb_tokenize(texts)]
        rewards = torch.from_numpy(self._references.cider_d(words, images))
        if self._bleu_weight:
            bleu = torch.from_numpy(self._references.bleu(words, images)[:, 3])
            rewards = (1.0 - self._bleu_weight) * rewards + self._bleu_weight * bleu
        return rewards.float()


def advantages(rewards: Tensor) -> Tensor:
    """Return each reward ``(B, S)`` minus the mean reward of its image's other samples."""
    samples = rewards.shape[1]
    return (rewards - rewards.mean(dim=1, keepdim=True)) * samples / (samples - 1)


@torch.no_grad()
def draw(
    decoder: Decoder,
    grid: Tensor,
    samples: int,
    temperature: float,
    max_words: int,
    seeds: Sequence[int],
) -> list[list[int]]:
    """Sample S captions of each image; other images of the batch do not change an image's captions.

    Args:
        decoder: The decoder whose next-word distribution is sampled.
        grid: The images' features ``(B, N, D)``.
        samples: S, the number of captions of each image.
        temperature: The divisor of the logits, which is part of the policy.
        max_words: The length at which a caption is cut off, in words.
        seeds: The seed of each image, ``(B,)``.

    Returns:
        The token ids of R = B·S captions, the S captions of an image side by side.
    """

    def step(tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        logits, _, state = decoder.step(tokens, state)
        return torch.log_softmax(logits.float(), dim=-1), state

    options = SearchOptions(
        sample=True, num_captions=samples, temperature=temperature, max_words=max_words
    )
    first = torch.full((len(grid),), BOS, device=grid.device)
    each = [draw_noise(1, options, torch.Generator().manual_seed(seed)) for seed in seeds]
    noise = torch.cat(each)
    rules = [Forbid(UNSAID)]
    found = search(step, first, decoder.start(grid), options, rules, noise=noise)
    return [list(hypothesis.tokens) for image in found for hypothesis in image]


def policy_log_probs(
    decoder: Decoder,
    grid: Tensor,
    captions: Sequence[Sequence[int]],
    temperature: float,
    max_words: int,
) -> Tensor:
    """Return the log-probability of each caption under the policy that ``draw`` samples from.

    A caption of ``max_words`` is cut off. Its end is not sampled and has no gradient.

    Args:
        decoder: The decoder that learns.
        grid: The images' features ``(B, N, D)``.
        captions: The token ids of R = B·S captions, as ``draw`` returns them.
        temperature: The divisor of the logits.
        max_words: The length at which a caption was cut off, in words.

    Returns:
        The log-probabilities ``(R,)``, in nats.
    """
    length = max(map(len, captions)) + 1
    tokens = torch.full((len(captions), length + 1), PAD)
    for row, ids in zip(tokens, captions, strict=True):
        chosen = [BOS, *ids] if len(ids) == max_words else [BOS, *ids, EOS]
        row[: len(chosen)] = torch.tensor(chosen)
    tokens = tokens.to(grid.device)
    keep = tokens[:, 1:] != PAD
    logits, _ = decoder(grid, tokens[:, :-1], keep)
    allowed = torch.zeros(logits.shape[-1], device=logits.device)
    allowed[list(UNSAID)] = -torch.inf
    log_probs = torch.log_softmax((logits.float() + allowed) / temperature, dim=-1)
    terms = log_probs.gather(1, tokens[:, 1:][keep][:, None])[:, 0]
    rows = keep.nonzero()[:, 0]
    return terms.new_zeros(len(tokens)).index_add(0, rows, terms)


def policy_gradient_loss(log_probs: Tensor, rewards: Tensor) -> Tensor:
    """Return a loss whose gradient is the policy gradient of the summed expected reward.

    ``log_probs`` and ``rewards`` are ``(B, S)``.
    """
    return -(advantages(rewards) * log_probs).sum()


class SelfCritical(nn.Module):
    """The loss of a micro-batch of features; only the caption decoder learns.

    The loss and the reward are means over all captions sampled in a step. A micro-batch has only
    a share of these captions. ``seed`` is the seed of the present step. The seed and a photograph's
    index in the data fix the photograph's captions, in whichever process they are sampled.
    """

    def __init__(
        self,
        model: CaptionModel,
        reward: Reward,
        settings: SelfCriticalConfig,
        precision: torch.dtype,
    ) -> None:
        """Take the model whose caption decoder learns.

        Args:
            model: The captioner; its encoder and its projection do not learn.
            reward: The reward of a caption.
            settings: The number of samples and the temperature.
            precision: The dtype of the forward pass.
        """
        super().__init__()
        self.decoder, self._project = model.caption_decoder, model.project
        self._reward, self._settings, self._precision = reward, settings, precision
        self.seed = 0

    def begin_step(self, seed: int, step: int, steps: int) -> None:
        """Set the seed of a step; the loss does not depend on ``step`` or ``steps``."""
        self.seed = seed

    def counts(self, batch: Batch) -> Tensor:
        """Return the number of captions that are sampled for a micro-batch, ``(1,)``."""
        return torch.tensor([float(len(batch.images) * self._settings.samples)])

    def forward(self, batch: Batch, totals: Tensor) -> tuple[Tensor, Tensor]:
        """Return a micro-batch's share of the step's loss, and of the step's mean reward.

        ``totals`` is the sum of ``counts`` over the micro-batches of all processes.
        """
        if not len(batch.images):
            return no_loss(self.parameters()), totals.new_zeros(())
        samples, temperature = self._settings.samples, self._settings.temperature
        limit, device = SearchOptions.max_words, totals.device
        seeds = [Random(f"{self.seed}/{index}").getrandbits(62) for index in batch.indices]
        with autocast(device, self._precision), torch.no_grad():
            grid = self._project(batch.images.to(device).float())
            captions = draw(self.decoder, grid, samples, temperature, limit, seeds)
        # A second autocast, because the first caches the weights it cast without gradient.
        with autocast(device, self._precision):
            log_probs = policy_log_probs(self.decoder, grid, captions, temperature, limit)
        images = [index for index in batch.indices for _ in range(samples)]
        rewards = self._reward(captions, images).to(device)
        loss = policy_gradient_loss(log_probs.view(-1, samples), rewards.view(-1, samples))
        return loss / totals[0], rewards.sum() / totals[0]
