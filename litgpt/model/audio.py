"""The audio tower: the encoder of Whisper over the log-mel frames of sounds, and a projector to the decoder's width.

Sounds of any lengths are one packed sequence of places. The published models run on frames that are padded with silence
to the longest sound and mask what is after the end; here the convolutions read only as much of the silence as what is
before the end depends on, and the blocks none of it. A tower may cut sounds into chunks, and encode each as a sound.

Axes: S sounds or chunks, M mel bands, F frames, N frames or places of all sounds, C width of the tower, D width of the
decoder.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from litgpt.errors import UserError
from litgpt.model.audio_config import STRIDE, AudioShape
from litgpt.model.media import Sounds
from litgpt.model.tower_block import TowerBlock

KERNEL = 3  # frames that a convolution reads
PERIOD_RATIO = 10_000  # the longest period of the sinusoids, by the shortest


class AudioTower(nn.Module):
    """An audio tower with its projector; the positions, which are sinusoids also where a table is published, are not
    trained.

    Args:
        width: of the decoder, D.
    """

    def __init__(self, shape: AudioShape, width: int) -> None:
        super().__init__()
        self.shape = shape
        self.conv_1 = nn.Conv1d(shape.mels, shape.width, KERNEL, padding=1)
        self.conv_2 = nn.Conv1d(shape.width, shape.width, KERNEL, stride=STRIDE, padding=1)
        self.positions = nn.Embedding(shape.places, shape.width) if shape.positions == "table" else None
        self.edge_tokens = nn.Embedding(2, width) if shape.edge_tokens else None
        for table in (self.positions, self.edge_tokens):  # published and kept as they are
            if table is not None:
                table.requires_grad_(False)
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
        shape, weight = self.shape, self.conv_1.weight
        check_lengths(shape, sounds.lengths)
        chunks = [chunk for length in sounds.lengths for chunk in shape.list_chunks(length)]
        read, places = (list(map(count, chunks)) for count in (shape.count_read_frames, shape.count_places))
        parts = sounds.frames_NM.to(weight.device, weight.dtype).split(read)
        frames_SFM = pad_sequence(parts, batch_first=True)
        # zeros after the frames that are read are what both convolutions read there, or are not read for its places
        counts_S11 = torch.tensor(read, device=weight.device)[:, None, None]
        is_read_S1F = torch.arange(frames_SFM.shape[1], device=weight.device) < counts_S11
        hidden_SCF = F.gelu(self.conv_1(frames_SFM.mT)) * is_read_S1F
        hidden_SFC = F.gelu(self.conv_2(hidden_SCF)).mT
        hidden_SFC = hidden_SFC + self._build_positions(hidden_SFC.shape[1]).to(hidden_SFC.dtype)
        x_NC = torch.cat([chunk[:count] for chunk, count in zip(hidden_SFC, places, strict=True)])
        for block in self.blocks:
            x_NC = block(x_NC, places, None)
        of_sounds = x_NC.split(list(map(shape.count_places, sounds.lengths)))
        pairs = [sound[: len(sound) // STRIDE * STRIDE].unflatten(0, (-1, STRIDE)) for sound in of_sounds]
        features: Tensor = self.projector(self.norm_final(torch.cat(pairs).mean(1)))
        return features

    def _build_positions(self, places: int) -> Tensor:
        """The positions of the first places, (F, C)."""
        numbers_F = torch.arange(places, device=self.conv_1.weight.device)
        return build_sinusoids(numbers_F, self.shape.width) if self.positions is None else self.positions(numbers_F)


def build_sinusoids(numbers_F: Tensor, width: int) -> Tensor:
    """Sines and cosines of positions, (F, C), with periods from 2 pi to `PERIOD_RATIO` times that.

    They are those of Whisper (Radford et al. 2022), whose periods include both ends.
    """
    step = math.log(PERIOD_RATIO) / (width // 2 - 1)
    frequencies = torch.exp(torch.arange(width // 2, device=numbers_F.device) * -step)
    radians = numbers_F[:, None] * frequencies
    return torch.cat([radians.sin(), radians.cos()], 1)


def check_lengths(shape: AudioShape, lengths: tuple[int, ...]) -> None:
    """Check that a tower can encode sounds of these numbers of frames.

    Raises:
        UserError: with the first number that it cannot.
    """
    for length in lengths:
        if shape.most_frames is not None and length > shape.most_frames:
            raise UserError(f"sound of {length} frames: the audio tower reads at most {shape.most_frames}; cut it")
        if shape.count_features(length) < 1:
            least = STRIDE * (STRIDE - 1) + 1
            raise UserError(f"sound of {length} frames: too short for the audio tower, which reads {least} or more")
