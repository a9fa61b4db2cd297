"""The shape of a vision tower and of its projector: `Config.vision`, checked."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_type_hints

from litgpt.model.field_checks import check_type, field_error

Act = Literal["gelu", "gelu_pytorch_tanh", "quick_gelu", "silu"]


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """The blocks of a tower.

    Attributes:
        mlp_size: intermediate size of the feed-forward layers; `mlp_form` says whether they have a gate.
        key_bias: whether keys have a bias where queries and values have one.
        qk_norm: whether queries and keys are normalized, over all heads together.
        rope_interleave: whether the rotary embedding pairs neighbours, not a feature with that half a head after it.
        layer_scale: whether each layer multiplies what it adds by learned factors (Touvron et al. 2021, CaiT, 2.1).
    """

    width: int
    layers: int
    heads: int
    mlp_size: int
    mlp_form: Literal["plain", "gated"] = "plain"
    act: Act = "gelu"
    norm: Literal["layer", "rms"] = "layer"
    eps: float = 1e-6
    qkv_bias: bool = True
    key_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    qk_norm: bool = False
    rope_interleave: bool = False
    layer_scale: bool = False


@dataclass(frozen=True, kw_only=True)
class TowerShape(BlockShape):
    """A vision tower, which encodes patches of images, and the projector of its features to the decoder's width.

    Sizes are in elements, of images in pixels, unless said.

    Attributes:
        patch: side of a patch.
        temporal: frames in a patch; a still image fills them all.
        merge: side, in patches, of the block whose features are merged into one that the decoder reads.
        class_token: whether a learned token precedes the patches of every image.
        class_last: whether its learned position is after those of the patches, not before.
        mask_token: whether the token that stood for hidden patches in pretraining is published; it is not used.
        positions: learned embeddings of positions: none, one for each patch of an image of `side` by `side` patches, or
            for images of any size those of the nearest place in such an image (`bucket`), between the four nearest
            (`interpolated`), or between the sixteen nearest (`bicubic`).
        pixels: side of an image whose last pixels fill no patch; None for one of `side` patches.
        patch_norm: whether there is a norm before positions are added; `first_norm` is one after.
        rope_base: base of the rotary embedding of rows and columns; None without one.
        rope_first: what the first half of the pairs of the rotary embedding is for.
        rope_frequencies: rows and columns have the same frequencies (`shared`), or in turn those of a single one.
        final_norm: the norm after the last block; `unused` if it is published and not applied.
        blocks_run: number of blocks, from the first, that run; the others are published and not used.
        window: side of the windows that attention is limited to, except in the layers `full_layers`; None for none.
        pooling: whether a head that pools all features into one is published; it is not used.
        projector_hidden: intermediate size of the projector; None for a single matrix.
        projector_form: what follows the first matrix and its activation: another matrix (`plain`), one of
            `projector_hidden` with this activation again and another one (`triple`), or a gated feed-forward layer of
            `projector_hidden` with the tower's activation (`gated`).
        projector_merge: how the features of a block become one: side by side (`concat`), on average (`mean`), or side
            by side for each number of a patch, through a matrix of the tower's width (`matrix`), or through one of the
            decoder's width and a bias (`convolution`).
        projector_norm: the norm of each patch's features before they are merged, or of what `projector_norm_at` names:
            blocks after it, or the output of the first matrix (`hidden`).
        projector_eps: of that norm; None for `eps`.
        canvases: heights and widths of the canvases on one of which an image is cut into tiles; None for no such.
        canvas_tiles: the number of tiles whose features a canvas has at most, and interpolated ones if it has more;
            None for all.
        line_break: whether a learned feature ends each row of features of a canvas, and those of a video.
        frame_block: how many times fewer rows and columns of features a frame of a video has, interpolated.
        deep_layers: layers after which another projector reads features, which the decoder adds after its first layers,
            one each (Meng et al. 2024, DeepStack).
        image_blocks: whether the tokens of an image attend to each other in the decoder, also to later ones.
        prompt_blocks: the same for all tokens of a prompt, images and text (Beyer et al. 2024, PaliGemma, figure 2).
        image_token, video_token: ids of the tokens at whose places the decoder reads features.
        start_token, end_token: ids of the tokens around them, as published.
        mark: the token that a chat template writes for an image, `image`, `start` or its own text, and the text around
            the image token in place of it, with `{start}`, `{image}` and `{end}`; None for the image token.
        tile_texts: the text of an image that is cut into tiles: of a `tile` in `{row}` and `{column}` with `{places}`,
            what is `between` two in a row if that is not nothing, the end of a row, `row_end`, and the `whole` image
            after them; `single` for an image that is not cut. None for places only.
        objects: how texts name objects in images: the `box` and the `name`, the `corner` of a box with what is
            `between` two, in the `unit` `thousandth` of a side, `bin` of 1024 of a side, or `pixel` of the resized
            image; None for the usual.
        frame_runs: whether positions count each step of frames of a video as an image.
        frame_texts: the text of a video: of each `step` of frames, with its `{number}`, `{seconds}` (or `{minutes}` and
            the `{rest}` of them) and `{places}`, and what is `between` two; and the `mark` that a chat template writes
            for it. They have the tokens around media, `{start}` and `{end}`. `begin` and `end`, if given, are around
            all, with the number of `{frames}` in words and the `{duration}`. None for places only.
        video_processor: the class of the processor of videos, if the folder does not name it; None if it reads none.
        video_settings: without settings of videos in the folder, those of images are for videos too (`shared`), or the
            processor's defaults are (`own`).
        step_seconds: the time of a step of frames, by the chosen `frames`, or by the `fps` of the `settings` whatever
            frames a video has.
        tokens_per_second: positions that a second of video advances by; None if each step of frames advances by one.
        chunk_seconds: the time after which the features of a video's sound follow those of its frames, in turn; None
            for a model that reads no sounds among frames.
    """

    patch: int
    channels: int = 3
    temporal: int = 1
    merge: int = 1
    patch_bias: bool = False
    class_token: bool = False
    class_last: bool = False
    mask_token: bool = False
    positions: Literal["none", "learned", "bucket", "interpolated", "bicubic"] = "none"
    side: int | None = None
    pixels: int | None = None
    rope_base: float | None = None
    rope_first: Literal["rows", "columns"] = "rows"
    rope_frequencies: Literal["shared", "in_turn"] = "shared"
    patch_norm: bool = False
    first_norm: bool = False
    final_norm: Literal["none", "applied", "unused"] = "none"
    blocks_run: int
    window: int | None = None
    full_layers: list[int] | None = None
    pooling: bool = False
    projector_hidden: int | None = None
    projector_act: Act = "gelu"
    projector_bias: bool = True
    projector_form: Literal["plain", "triple", "gated"] = "plain"
    projector_merge: Literal["concat", "mean", "matrix", "convolution"] = "concat"
    projector_norm: Literal["none", "layer", "rms", "offset_rms"] = "none"
    projector_norm_at: Literal["patch", "block", "hidden"] = "patch"
    projector_eps: float | None = None
    canvases: list[Any] | None = None
    canvas_tiles: int | None = None
    line_break: bool = False
    frame_block: int = 1
    deep_layers: list[int] | None = None
    image_blocks: bool = False
    prompt_blocks: bool = False
    image_token: int
    video_token: int | None = None
    start_token: int | None = None
    end_token: int | None = None
    mark: dict[str, Any] | None = None
    tile_texts: dict[str, Any] | None = None
    objects: dict[str, Any] | None = None
    frame_runs: bool = False
    frame_texts: dict[str, Any] | None = None
    video_processor: str | None = None
    video_settings: Literal["shared", "own"] = "shared"
    step_seconds: Literal["frames", "settings"] = "frames"
    tokens_per_second: float | None = None
    chunk_seconds: float | None = None

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> "TowerShape":
        """The shape with these fields.

        Raises:
            UserError: naming a field of `model_config.vision` that is missing, unknown or has an invalid value.
        """
        types, required = get_type_hints(cls), {"width", "layers", "heads", "mlp_size", "patch", "blocks_run"}
        for key in sorted((required | {"image_token"}) - values.keys()):
            raise field_error(f"vision.{key}", "missing", "set it")
        for key in sorted(values.keys() - types.keys()):
            raise field_error(f"vision.{key}", "unknown field", "remove it")
        shape = cls(**{key: check_type(f"vision.{key}", value, types[key]) for key, value in values.items()})
        shape._check()
        return shape

    def _check(self) -> None:
        sizes = [each.name for each in fields(self) if each.name in SIZES]
        for key in sizes:
            value = getattr(self, key)
            if value is not None and not 1 <= value <= 2**20:
                raise field_error(f"vision.{key}", f"{value} is out of range", f"use 1 to {2**20}")
        if self.width % self.heads or (self.rope_base and self.width // self.heads % 4):
            cure = f"use e.g. {self.heads * 64}"
            raise field_error("vision.width", f"{self.width} does not fit {self.heads} heads", cure)
        if not 0 <= self.blocks_run <= self.layers:
            raise field_error("vision.blocks_run", f"{self.blocks_run} of {self.layers} blocks", f"use {self.layers}")
        deep = self.deep_layers or []
        if deep != sorted({*deep} & {*range(self.blocks_run)}):
            problem = f"{deep} are not ascending numbers of layers that run"
            raise field_error("vision.deep_layers", problem, f"use 0 to {self.blocks_run - 1}")
        if self.positions != "none" and self.side is None:
            raise field_error("vision.side", f"None with positions: {self.positions}", "use e.g. 24")
        if self.pixels is not None and self.pixels // self.patch != self.side:
            problem = f"{self.pixels} with side: {self.side} and patch: {self.patch}"
            raise field_error("vision.pixels", problem, "use null")
        if self.line_break and deep:
            raise field_error("vision.deep_layers", f"{deep} with line_break: true", "use null")
        if self.projector_form != "plain" and self.projector_hidden is None:
            problem = f"None with projector_form: {self.projector_form}"
            raise field_error("vision.projector_hidden", problem, "use e.g. 4096")
        if self.window is not None and self.class_token:
            raise field_error(
                "vision.window", f"{self.window} with class_token: true, a token in no window", "use null"
            )
        if self.window is not None and self.window < self.merge * self.patch:
            problem = f"{self.window} is less than a block of {self.merge * self.patch}"
            raise field_error("vision.window", problem, f"use e.g. {8 * self.patch}")
        self._check_blocks()

    def _check_blocks(self) -> None:
        if self.image_blocks and self.positions != "learned":
            problem = f"true with positions: {self.positions}, for images of any size"
            raise field_error("vision.image_blocks", problem, "use positions: learned")
        if self.image_blocks and self.prompt_blocks:
            raise field_error("vision.image_blocks", "true with prompt_blocks: true, which has them", "use false")

    def to_dict(self) -> dict[str, Any]:
        """All fields, as for `from_values`."""
        return asdict(self)

    @property
    def patch_numbers(self) -> int:
        """Numbers in a patch."""
        return self.channels * self.temporal * self.patch**2

    @property
    def image_size(self) -> int:
        """Height and width in pixels of the image that the tower has positions for; 0 without positions."""
        return self.pixels or (self.side or 0) * self.patch

    @property
    def has_blocks(self) -> bool:
        """Whether some tokens attend to later ones in the decoder."""
        return self.image_blocks or self.prompt_blocks

    def count_block_tokens(self, context: int) -> int:
        """The most tokens of a block that attend to each other in the decoder; 0 if none do.

        Args:
            context: the most tokens of a text.
        """
        if self.prompt_blocks:
            return context
        return (self.side or 0) ** 2 // self.merge**2 if self.image_blocks else 0

    @property
    def media_tokens(self) -> list[int]:
        """The ids of the tokens at whose places the decoder reads features."""
        return [token for token in (self.image_token, self.video_token) if token is not None]


SIZES = (
    *("width", "layers", "heads", "mlp_size", "patch", "channels", "temporal", "merge", "side", "pixels"),
    *("projector_hidden", "canvas_tiles", "frame_block"),
)
