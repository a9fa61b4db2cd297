"""The head of a published model that draws images by codes of its own, which are no tokens of its vocabulary (Janus).

Axes: M codes, D width of the decoder, B batch, T tokens.
"""

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from litgpt.model.tower_block import TOWER_ACTIVATIONS
from litgpt.model.tower_config import Act


@dataclass(frozen=True)
class ImageHeadShape:
    """The shape of an image head.

    Attributes:
        codes: number of different codes.
        embed: width of their embeddings.
        width: of the decoder, D.
        layers: number of matrices between the embeddings and the decoder.
        act: between two matrices.
    """

    codes: int
    embed: int
    width: int
    layers: int
    act: Act


class ImageHead(nn.Module):
    """Embeds codes of images for a decoder, and computes the logits of the next code from what the decoder computes."""

    def __init__(self, shape: ImageHeadShape) -> None:
        super().__init__()
        width = shape.width
        self.act = TOWER_ACTIVATIONS[shape.act]
        self.embedding = nn.Embedding(shape.codes, shape.embed)
        self.first = nn.Linear(shape.embed, width)
        self.layers = nn.ModuleList(nn.Linear(*sizes) for sizes in pairwise([width] * shape.layers))
        self.hidden, self.output = nn.Linear(width, width), nn.Linear(width, shape.codes)

    def embed(self, codes_M: Tensor) -> Tensor:
        """What the decoder reads for codes, (M, D)."""
        x_MD = self.first(self.embedding(codes_M))
        for layer in self.layers:
            x_MD = layer(self.act(x_MD))
        return x_MD

    def prepare(self, hidden_BTD: Tensor) -> Tensor:
        """What `output` computes logits from; (B, T, D) to (B, T, D)."""
        return self.act(self.hidden(hidden_BTD))
