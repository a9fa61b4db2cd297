"""The audio tower: the encoder of Whisper over the log-mel frames of sounds, and a projector to the decoder's width.

Sounds of any lengths are one packed sequence of places. The published models run on frames that are padded with silence
to the longest sound and mask what is after the end; here the convolutions read only as much of the silence as what is
before the end depends on, and the blocks none of it.

Axes: S sounds, M mel bands, F frames, N frames or places of all sounds, C width of the tower, D width of the decoder.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from litgpt.errors import UserError
from litgpt.model.audio_config import STRIDE, AudioShape
from litgpt.model.media import Sounds
from litgpt.model.vision import TowerBlock

KERNEL = 3  # frames that a convolution reads


class AudioTower(nn.Module):
    """An audio tower with its projector; the positions, which are sinusoids as published, are not trained.

    Args:
        width: of the decoder, D.
    """

    def __init__(self, shape: AudioShape, width: int) -> None:
        super().__init__()
        self.shape = shape
        self.conv_1 = nn.Conv1d(shape.mels, shape.width, KERNEL, padding=1)
        self.conv_2 = nn.Conv1d(shape.width, shape.width, KERNEL, stride=STRIDE, padding=1)
        self.positions = nn.Embedding(shape.places, shape.width)
        self.positions.requires_grad_(False)
        self.blocks = nn.ModuleList(TowerBlock(shape) for _ in range(shape.layers))
        self.norm_final = nn.LayerNorm(shape.width, eps=shape.eps)
        self.projector = nn.Linear(shape.width, width)

    @property
    def is_trained(self) -> bool:
        """Whether any of its parameters has gradients."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def compute_zero(self) -> Tensor:
        """Zero, (), with gradients of zero for all parameters that are trained."""
        frames = STRIDE * STRIDE
        blank = torch.zeros(self.shape.count_read_frames(frames), self.shape.mels)
        return self(Sounds(blank, (frames,))).sum() * 0

    def forward(self, sounds: Sounds) -> Tensor:
        """Features (N, D) of all sounds, in order.

        Raises:
            UserError: if a sound is longer than the tower has positions for, or too short for a feature.
        """
        check_lengths(self.shape, sounds.lengths)
        weight, places = self.conv_1.weight, [self.shape.count_places(length) for length in sounds.lengths]
        frames_NM = sounds.frames_NM.to(weight.device, weight.dtype)
        parts = frames_NM.split([self.shape.count_read_frames(length) for length in sounds.lengths])
        # zeros after the frames of a sound are what the convolutions read at its end, or are not read for its places
        hidden_SCF = F.gelu(self.conv_1(pad_sequence(parts, batch_first=True).mT))
        hidden_SFC = F.gelu(self.conv_2(hidden_SCF)).mT
        x_NC = torch.cat([self._add_positions(sound[:count]) for sound, count in zip(hidden_SFC, places, strict=True)])
        for block in self.blocks:
            x_NC = block(x_NC, places, None)
        pairs = [sound[: len(sound) // STRIDE * STRIDE].unflatten(0, (-1, STRIDE)) for sound in x_NC.split(places)]
        features: Tensor = self.projector(self.norm_final(torch.cat(pairs).mean(1)))
        return features

    def _add_positions(self, x_FC: Tensor) -> Tensor:
        return x_FC + self.positions(torch.arange(len(x_FC), device=x_FC.device))


def check_lengths(shape: AudioShape, lengths: tuple[int, ...]) -> None:
    """Check that a tower can encode sounds of these numbers of frames.

    Raises:
        UserError: with the first number that it cannot.
    """
    for length in lengths:
        if length > shape.most_frames:
            raise UserError(f"sound of {length} frames: the audio tower reads at most {shape.most_frames}; cut it")
        if shape.count_features(length) < 1:
            least = STRIDE * (STRIDE - 1) + 1
            raise UserError(f"sound of {length} frames: too short for the audio tower, which reads {least} or more")
